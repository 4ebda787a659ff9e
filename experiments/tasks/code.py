"""Writing code: instructions with answers for training, HumanEval's functions as the test."""

from __future__ import annotations

import pandas as pd

from experiments.tasks.humaneval import passes
from experiments.tasks.splits import Splits, carve
from experiments.tasks.task import Task

_CODEFEEDBACK = Splits("m-a-p/CodeFeedback-Filtered-Instruction", "codefeedback", None, {"train": 156526})
_HUMANEVAL = Splits("openai/openai_humaneval", "humaneval", None, {"test": 164})
_ASK = "Complete this Python function so that it passes its tests, and answer with the whole function."


def code(data: str) -> Task:
    """CodeFeedback (Zheng et al. 2024) for training, HumanEval (Chen et al. 2021) as the test.

    The score is pass@1 of one greedy answer. Scoring executes what the model wrote: `humaneval.check_allowed`.
    """

    def read(split: str) -> pd.DataFrame:
        if split == "test":
            return _problems(_HUMANEVAL.read("test", data))
        rows = _CODEFEEDBACK.read("train", data)
        return carve(pd.DataFrame({"prompt": rows["query"], "completion": rows["answer"]}), split)

    published = {**_CODEFEEDBACK.rows, **_HUMANEVAL.rows}
    return Task("code", "causal", read, judge=passes, published=published, harness={"humaneval_instruct": _HUMANEVAL})


def _problems(rows: pd.DataFrame) -> pd.DataFrame:
    """A stub to complete, as a request and its answer, with what its tests need."""
    stub = rows["prompt"]
    return pd.DataFrame(
        {
            "prompt": _ASK + "\n\n```python\n" + stub + "```",
            "completion": "```python\n" + stub + rows["canonical_solution"] + "```",
            "stub": stub,
            "test": rows["test"],
            "entry_point": rows["entry_point"],
        }
    )
