"""Answers to MT-Bench for an external judge: `python -m experiments.mt_bench RUN_FOLDER` writes FastChat's format.

The file RUN_FOLDER/mt_bench.jsonl goes to `data/mt_bench/model_answer/` of FastChat's llm_judge (Zheng et al. 2023).
"""

from __future__ import annotations

import argparse
import json
import sys
import uuid
from pathlib import Path
from typing import Any

import pandas as pd

from experiments import trust
from experiments.errors import ExperimentError
from experiments.families.causal import CausalModel
from experiments.outcome import load_trained
from experiments.results import write_text
from experiments.run import Run
from experiments.tasks.instruction import mt_bench
from uniproj import AdapterError, ProjectionError, console

FILE = "mt_bench.jsonl"


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


@console.command
def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m experiments.mt_bench", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a finished run of a causal model")
    parser.add_argument("--questions", type=int, help="only the first so many of the 80")
    trust.add_options(parser)
    args = parser.parse_args(argv)
    try:
        trust.apply(args)
        run = load_trained(args.folder, "mt_bench")
        found = answers(run, mt_bench(run.config.data).head(args.questions or 80))
    except (ExperimentError, ProjectionError, AdapterError) as error:
        print(error, file=sys.stderr)
        return 2
    write_text(args.folder / FILE, "".join(json.dumps(answer) + "\n" for answer in found))
    print(f"{len(found)} answers: {args.folder / FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
