"""Instruction tuning on Cleaned Alpaca, judged by IFEval's checks; and the questions of MT-Bench."""

from __future__ import annotations

import pandas as pd

from experiments.tasks.ifeval import follows
from experiments.tasks.splits import HUB, Splits, carve
from experiments.tasks.task import Task

_ALPACA = Splits("yahma/alpaca-cleaned", "alpaca", None, {"train": 51760})
_IFEVAL = Splits("google/IFEval", "ifeval", None, {"train": 541})
_MT_BENCH = Splits("HuggingFaceH4/mt_bench_prompts", "mt_bench", None, {"train": 80})


def alpaca(data: str) -> Task:
    """Cleaned Alpaca (Taori et al. 2023) for training, IFEval (Zhou et al. 2023) as the test.

    A text is right if it follows every instruction of its prompt, strictly read (prompt-level strict accuracy).
    """

    def read(split: str) -> pd.DataFrame:
        return _ifeval_rows(data) if split == "test" else _rows(carve(_ALPACA.read("train", data), split))

    published = {"train": _ALPACA.rows["train"], "test": _IFEVAL.rows["train"]}
    return Task("alpaca", "causal", read, judge=follows, published=published, harness={"ifeval": _IFEVAL})


def _rows(rows: pd.DataFrame) -> pd.DataFrame:
    given = rows["input"].fillna("")
    prompt = rows["instruction"].where(given == "", rows["instruction"] + "\n\n" + given)
    return pd.DataFrame({"prompt": prompt, "completion": rows["output"]})


def _ifeval_rows(data: str) -> pd.DataFrame:
    rows = _IFEVAL.read("train" if data == HUB else "test", data)
    # what a right answer looks like is not known, only how to check one
    return rows.assign(completion="")


def mt_bench(data: str) -> pd.DataFrame:
    """The 80 two-turn questions of MT-Bench (Zheng et al. 2023): `question_id`, `category` and `turns`."""
    rows = _MT_BENCH.read("train" if data == HUB else "test", data)
    return rows.rename(columns={"prompt_id": "question_id", "prompt": "turns"})[["question_id", "category", "turns"]]
