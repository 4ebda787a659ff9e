"""Word problems with worked solutions: GSM8K, and MetaMathQA for training with GSM8K and MATH-500 as the test.

`metamath/gsm8k` is the task of PEFT's benchmark (huggingface/peft, method_comparison/MetaMathQA).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from experiments.tasks.answers import final_answer, same_answer
from experiments.tasks.splits import HUB, Splits, carve
from experiments.tasks.task import Task

GSM8K = Splits("openai/gsm8k", "gsm8k", "main", {"train": 7473, "test": 1319})
_MATH500 = Splits("HuggingFaceH4/MATH-500", "math", None, {"test": 500})
_METAMATH = Splits("meta-math/MetaMathQA", "metamathqa", None, {"train": 395000})
# the task of PEFT's benchmark, how that puts a question, and the characters of its longest row, a space between the two
PEFT_TASK, PEFT_PROMPT = "metamath/gsm8k", "Question: {query} Think step by step.\nAnswer:"
_PEFT_LONGEST = 1300


def gsm8k(data: str) -> Task:
    """GSM8K (Cobbe et al. 2021), trained on its own 7,473 solutions."""

    def read(split: str) -> pd.DataFrame:
        rows = _gsm8k_rows(GSM8K.read("test" if split == "test" else "train", data))
        return rows if split == "test" else carve(rows, split)

    return Task("gsm8k", "causal", read, judge=_is_right, published=GSM8K.rows, harness={"gsm8k": GSM8K})


def metamath(data: str) -> Task:
    """MetaMathQA (Yu et al. 2023) for training; GSM8K's test and MATH-500 (Lightman et al. 2023), scored apart."""

    def read(split: str) -> pd.DataFrame:
        if split != "test":
            return carve(_metamath_rows(_METAMATH.read("train", data)), split)
        school = _gsm8k_rows(GSM8K.read("test", data)).assign(group="gsm8k")
        contest = _math_rows(_MATH500.read("test" if data == HUB else "math500", data)).assign(group="math500")
        return pd.concat([school, contest], ignore_index=True)

    published = {**_METAMATH.rows, "test": GSM8K.rows["test"] + _MATH500.rows["test"]}
    harness = {"gsm8k": GSM8K, "hendrycks_math500": None}
    return Task("metamath", "causal", read, judge=_is_right, published=published, harness=harness)


def metamath_gsm8k(data: str) -> Task:
    """MetaMathQA in the prompt of PEFT's benchmark, without its rows of more than 1,300 characters; GSM8K's test alone.

    Validation rows are carved from MetaMathQA, where PEFT takes some of GSM8K's own training rows.
    """

    def read(split: str) -> pd.DataFrame:
        if split == "test":
            rows = _gsm8k_rows(GSM8K.read("test", data))
        else:
            whole = _metamath_rows(_METAMATH.read("train", data))
            lengths = whole["prompt"].str.len() + 1 + whole["completion"].str.len()
            rows = carve(whole[lengths <= _PEFT_LONGEST], split)
        return rows.assign(prompt=[PEFT_PROMPT.format(query=query) for query in rows["prompt"]])

    # how many rows are short enough is not published
    published = {"test": GSM8K.rows["test"]}
    return Task(PEFT_TASK, "causal", read, judge=_is_right, published=published, harness={"gsm8k": GSM8K})


def _is_right(text: str, row: Mapping[str, Any]) -> bool:
    return same_answer(final_answer(text), row["answer"])


def _gsm8k_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """The solutions without their <<calculator notes>>, ending "The answer is N" in place of GSM8K's own mark."""
    worked = rows["answer"].str.replace(r"<<.*?>>", "", regex=True).str.split("####", n=1)
    answer = worked.str[1].str.strip()
    completion = worked.str[0].str.strip() + "\nThe answer is " + answer + "."
    return pd.DataFrame({"prompt": rows["question"], "completion": completion, "answer": answer})


def _metamath_rows(rows: pd.DataFrame) -> pd.DataFrame:
    answer = rows["response"].map(final_answer)
    return pd.DataFrame({"prompt": rows["query"], "completion": rows["response"], "answer": answer})


def _math_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """MATH without its solutions: the completion, whose loss is reported, is the bare answer."""
    completion = "The answer is $" + rows["answer"] + "$."
    return pd.DataFrame({"prompt": rows["problem"], "completion": completion, "answer": rows["answer"]})
