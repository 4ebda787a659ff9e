"""Word problems with worked solutions: GSM8K, and MetaMathQA for training with GSM8K or MATH-500 as the test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pandas as pd

from experiments.answers import final_answer, same_answer
from experiments.tasks.sources import Source, carve
from experiments.tasks.task import Task

GSM8K = Source("openai/gsm8k", "gsm8k", "main", {"train": 7473, "test": 1319})
MATH500 = Source("HuggingFaceH4/MATH-500", "math", None, {"test": 500})
METAMATH = Source("meta-math/MetaMathQA", "metamathqa", None, {"train": 395000})


def gsm8k(data: str) -> Task:
    """GSM8K (Cobbe et al. 2021), trained on its own 7,473 solutions."""
    return _task("gsm8k", GSM8K, _gsm8k_rows, GSM8K, "test", _gsm8k_rows, data)


def metamath_gsm8k(data: str) -> Task:
    """MetaMathQA (Yu et al. 2023) for training, GSM8K's test."""
    return _task("metamath/gsm8k", METAMATH, _metamath_rows, GSM8K, "test", _gsm8k_rows, data)


def metamath_math500(data: str) -> Task:
    """MetaMathQA for training, MATH-500 (Lightman et al. 2023) as the test."""
    test = "test" if data == "hub" else "math500"
    return _task("metamath/math500", METAMATH, _metamath_rows, MATH500, test, _math_rows, data)


Rows = Callable[[pd.DataFrame], pd.DataFrame]


def _task(name: str, train: Source, read_train: Rows, test: Source, split: str, read_test: Rows, data: str) -> Task:
    def read(wanted: str) -> pd.DataFrame:
        if wanted == "test":
            return read_test(test.read(split, data))
        return carve(read_train(train.read("train", data)), wanted)

    published = {"train": train.rows["train"], "test": test.rows["test"]}
    return Task(name, "causal", read, judge=_is_right, published=published)


def _is_right(text: str, row: Mapping[str, Any]) -> bool:
    return same_answer(final_answer(text), row["answer"])


def _gsm8k_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """The solutions without their <<calculator notes>>, ending "The answer is N" in place of GSM8K's own mark."""
    worked = rows["answer"].str.replace(r"<<.*?>>", "", regex=True).str.split("####", n=1)
    answer = worked.str[1].str.strip()
    completion = worked.str[0].str.strip() + "\nThe answer is " + answer + "."
    return pd.DataFrame({"prompt": rows["question"], "completion": completion, "answer": answer})


def _metamath_rows(rows: pd.DataFrame) -> pd.DataFrame:
    answer = rows["response"].map(partial(final_answer))
    return pd.DataFrame({"prompt": rows["query"], "completion": rows["response"], "answer": answer})


def _math_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """MATH without its solutions: the completion, whose loss is reported, is the bare answer."""
    completion = "The answer is $" + rows["answer"] + "$."
    return pd.DataFrame({"prompt": rows["problem"], "completion": completion, "answer": rows["answer"]})
