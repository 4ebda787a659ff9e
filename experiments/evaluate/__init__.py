"""Finished runs on the tests of others: lm-evaluation-harness and MT-Bench."""

from experiments.evaluate.finished import load_finished
from experiments.evaluate.harness import forgetting, record, record_base, scores
from experiments.evaluate.mt_bench import ANSWERS, answers

__all__ = [
    "ANSWERS", "answers", "forgetting", "load_finished", "record", "record_base", "scores",
]  # fmt: skip
