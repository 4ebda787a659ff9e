"""Encoders and causal models with a classification head."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from experiments.models.classifier import Classifier, count_labels
from experiments.models.pretrained import load_classifier, load_tokenizer
from experiments.tasks import text_columns


class TextClassifier(Classifier):
    """GLUE-style tasks on any model that Transformers can give a sequence-classification head."""

    task_type = "SEQ_CLS"
    auto = AutoModelForSequenceClassification

    @cached_property
    def processor(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.base.name)

    def load(self, rows: pd.DataFrame) -> PreTrainedModel:
        labels = count_labels(rows["label"].to_numpy())
        return load_classifier(self.base, labels, self.processor.pad_token_id, self.seed)

    def encode(self, rows: pd.DataFrame) -> Dataset:
        texts = [rows[column].tolist() for column in text_columns(rows, "data")]
        encoded = dict(self.processor(*texts, truncation=True, max_length=self.max_length))
        return Dataset.from_dict(
            {**encoded, "label": rows["label"].tolist(), "length": [len(ids) for ids in encoded["input_ids"]]}
        )

    def collate(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return DataCollatorWithPadding(self.processor)(features)

    @staticmethod
    def made_up_row(config: PretrainedConfig) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.zeros(1, dtype=torch.long)}
