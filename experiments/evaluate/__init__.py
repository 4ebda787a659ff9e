"""Finished runs on the tests of others: lm-evaluation-harness and MT-Bench."""

from experiments.evaluate.harness import record, scores
from experiments.evaluate.mt_bench import answers
from experiments.evaluate.trained import load_trained

__all__ = [
    "answers", "load_trained", "record", "scores",
]  # fmt: skip
