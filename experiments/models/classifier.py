"""What classifiers of text and of images share: labels, scores of logits, and length-sorted scoring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from transformers import EvalPrediction, Trainer

from experiments.models.family import Family


def count_labels(labels: Any) -> int:
    """Number of outputs: classes counted from 0, or 1 for regression."""
    return 1 if labels.dtype.kind == "f" else int(labels.max()) + 1


class Classifier(Family):
    """A base with a fresh head that is trained whole; one output is regression."""

    # as PEFT knows them under the task type of sequence classification
    heads = ("classifier", "score")
    # where classes are unequal, the loss of few rows says which of them were drawn
    probe_rows = 256

    @property
    def metrics(self) -> Callable[[EvalPrediction], dict[str, float]]:
        def compute(output: EvalPrediction) -> dict[str, float]:
            return {"score": self.task.score(_predicted(output))}

        return compute

    def predict(self, trainer: Trainer, rows: pd.DataFrame) -> pd.DataFrame:
        data = self.encode(rows)
        found = _predicted(trainer.predict(data))
        # Trainer's batches are of like length, and it leaves the rows in their order
        sampler = trainer._get_eval_sampler(data)
        return found if sampler is None else found.set_index(pd.Index(list(sampler))).sort_index(ignore_index=True)


def _predicted(output: Any) -> pd.DataFrame:
    values = output.predictions[:, 0] if output.predictions.shape[1] == 1 else output.predictions.argmax(1)
    return pd.DataFrame({"label": np.asarray(output.label_ids), "prediction": values})
