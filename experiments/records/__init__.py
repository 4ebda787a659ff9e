"""What finished runs say: the reader of their folders, the only statistics, and the files that are committed."""

from experiments.records import baseline, gather, statistics
from experiments.records.committed import export
from experiments.records.reading import CHOICE, damage, is_done, load, load_runs, metrics, result, row

__all__ = [
    "CHOICE", "baseline", "damage", "export", "gather", "is_done", "load", "load_runs", "metrics", "result", "row",
    "statistics",
]  # fmt: skip
