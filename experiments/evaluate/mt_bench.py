"""Answers to MT-Bench's questions of two turns, in FastChat's format."""

from __future__ import annotations

import uuid
from typing import Any

import pandas as pd

from experiments.errors import ExperimentError
from experiments.models import CausalModel
from experiments.runs import Run

ANSWERS = "mt_bench.jsonl"


def answers(run: Run, questions: pd.DataFrame) -> list[dict[str, Any]]:
    """Both turns of every question, the second in sight of the first, generated greedily."""
    family = run.family
    if not isinstance(family, CausalModel):
        raise ExperimentError(f"mt_bench: {run.folder} must be a run of a causal model, got {run.task.family}.")
    turns = [list(q) for q in questions["turns"]]
    said: list[list[str]] = [[] for _ in turns]
    for number in range(2):
        prompts = [family.dialogue(asked[: number + 1], given) for asked, given in zip(turns, said, strict=True)]
        for given, text in zip(said, family.generate(run.trainer, prompts), strict=True):
            given.append(text)
    name = f"{run.config.model}-{run.config.projection}"
    return [_answer(name, int(q), given) for q, given in zip(questions["question_id"], said, strict=True)]


def _answer(name: str, question: int, turns: list[str]) -> dict[str, Any]:
    # the id is that of the content: the same run gives the same file
    answer = uuid.uuid5(uuid.NAMESPACE_OID, f"{name} {question} {turns}").hex
    choices = [{"index": 0, "turns": turns}]
    return {"question_id": question, "answer_id": answer, "model_id": name, "choices": choices, "tstamp": 0.0}
