"""Commonsense reasoning: one training set of eight tasks and their eight tests, in the prompts of LLM-Adapters.

Source: Hu et al. 2023, arXiv 2304.01933; the answer is generated ("the correct answer is X") and read off the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments.tasks.splits import HUB, Splits, carve
from experiments.tasks.task import Task

_TRAIN = Splits("zwhe99/commonsense_170k", "commonsense", None, {"train": 170420})
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Test:
    """One of the eight: the split on the hub whose labels are public, and its rows as (instruction, answer)."""

    splits: Splits
    split: str
    recast: Callable[[Row], tuple[str, str]]


def _choice(ask: str, word: str, question: str, options: Sequence[str], right: int, gap: str = " ") -> tuple[str, str]:
    """ask + question, numbered options, and the answer's format; `gap` lies between the options."""
    listed = gap.join(f"{word.capitalize()}{i}: {option}" for i, option in enumerate(options, 1))
    form = "/".join(f"{word}{i}" for i in range(1, len(options) + 1))
    between = " " if word == "option" else "\n\n"
    return f"{ask}: {question}\n\n{listed}{between}Answer format: {form}", f"{word}{right + 1}"


def _boolq(row: Row) -> tuple[str, str]:
    ask = f"Please answer the following question with true or false, question: {row['question']}?"
    return f"{ask}\n\nAnswer format: true/false", str(bool(row["answer"])).lower()


def _piqa(row: Row) -> tuple[str, str]:
    ask = "Please choose the correct solution to the question"
    return _choice(ask, "solution", row["goal"], [row["sol1"], row["sol2"]], int(row["label"]), "\n\n")


def _social(row: Row) -> tuple[str, str]:
    options = [row["answerA"], row["answerB"], row["answerC"]]
    return _choice(_QUESTION, "answer", f"{row['context']} {row['question']}", options, int(row["label"]) - 1)


def _hellaswag(row: Row) -> tuple[str, str]:
    ask = "Please choose the correct ending to complete the given sentence"
    return _choice(ask, "ending", f"{row['activity_label']}: {row['ctx']}", row["endings"], int(row["label"]))


def _winogrande(row: Row) -> tuple[str, str]:
    ask = "Please choose the correct answer to fill in the blank to complete the given sentence"
    return _choice(ask, "option", row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1)


def _exam(row: Row) -> tuple[str, str]:
    """ARC and OpenBookQA: labelled choices."""
    question = row.get("question", row.get("question_stem"))
    labels = list(row["choices"]["label"])
    return _choice(_QUESTION, "answer", question, list(row["choices"]["text"]), labels.index(row["answerKey"]))


_QUESTION = "Please choose the correct answer to the question"
TESTS = {
    "boolq": Test(Splits("google/boolq", "", None, {"validation": 3270}), "validation", _boolq),
    "piqa": Test(Splits("ybisk/piqa", "", None, {"validation": 1838}), "validation", _piqa),
    "social_i_qa": Test(Splits("allenai/social_i_qa", "", None, {"validation": 1954}), "validation", _social),
    "hellaswag": Test(Splits("Rowan/hellaswag", "", None, {"validation": 10042}), "validation", _hellaswag),
    "winogrande": Test(
        Splits("allenai/winogrande", "", "winogrande_xl", {"validation": 1267}), "validation", _winogrande
    ),
    "arc_easy": Test(Splits("allenai/ai2_arc", "", "ARC-Easy", {"test": 2376}), "test", _exam),
    "arc_challenge": Test(Splits("allenai/ai2_arc", "", "ARC-Challenge", {"test": 1172}), "test", _exam),
    "openbookqa": Test(Splits("allenai/openbookqa", "", "main", {"test": 500}), "test", _exam),
}


def commonsense(data: str) -> Task:
    """Commonsense-170K for training and the eight tests; the score is the mean of their accuracies."""

    def read(split: str) -> pd.DataFrame:
        if split == "test":
            return pd.concat([_test_rows(name, data) for name in TESTS], ignore_index=True)
        return _rows(carve(_TRAIN.read("train", data), split))

    tests = sum(test.splits.rows[test.split] for test in TESTS.values())
    published = {**_TRAIN.rows, "test": tests}
    # a data folder holds these as prompts, not in the columns of the hub
    harness = dict.fromkeys(name.replace("social_i_qa", "social_iqa") for name in TESTS)
    return Task("commonsense", "causal", read, judge=_is_right, published=published, harness=harness)


def _test_rows(name: str, data: str) -> pd.DataFrame:
    test = TESTS[name]
    if data == HUB:
        raw = test.splits.read(test.split, data)
        rows = pd.DataFrame([test.recast(row) for row in raw.to_dict("records")], columns=["instruction", "answer"])
        rows["output"] = "the correct answer is " + rows["answer"]
    else:
        rows = Splits(test.splits.hub, f"{_TRAIN.folder}/{name}").read("test", data)
    return _rows(rows).assign(group=name)


def _rows(rows: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"prompt": rows["instruction"], "completion": rows["output"], "answer": rows["answer"]})


def _is_right(text: str, row: Row) -> bool:
    """The first word of the answer's kind that the text names."""
    kind = "true|false" if row["answer"] in ("true", "false") else re.sub(r"\d", "", row["answer"]) + r"\d"
    found = re.search(rf"\b({kind})\b", text.lower())
    return found is not None and found[1] == row["answer"]
