"""Answers to MT-Bench for an external judge: `python -m experiments.mt_bench RUN_FOLDER` writes FastChat's format.

The file RUN_FOLDER/mt_bench.jsonl goes to `data/mt_bench/model_answer/` of FastChat's llm_judge (Zheng et al. 2023).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from experiments.errors import status
from experiments.evaluate import ANSWERS, answers, load_finished
from experiments.files import write_text
from experiments.models import trust
from experiments.tasks import mt_bench
from uniproj import console


@console.command
def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m experiments.mt_bench", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a finished run of a causal model")
    parser.add_argument("--questions", type=int, help="only the first so many of the 80")
    trust.add_options(parser)
    args = parser.parse_args(argv)

    def ask() -> int:
        trust.apply(args)
        run = load_finished(args.folder, "mt_bench")
        found = answers(run, mt_bench(run.config.data).head(args.questions or 80))
        write_text(args.folder / ANSWERS, "".join(json.dumps(answer) + "\n" for answer in found))
        print(f"{len(found)} answers: {args.folder / ANSWERS}")
        return 0

    return status(ask)


if __name__ == "__main__":
    sys.exit(main())
