"""What finished runs say: the reader of their folders, the only statistics, and the files that are committed."""

from experiments.records import baseline, cards, gather, method_comparison, statistics
from experiments.records.committed import OUT, RECORDS, export, without_paths
from experiments.records.reading import CHOICE, damage, is_done, load, losses, result, row

__all__ = [
    "CHOICE", "OUT", "RECORDS", "baseline", "cards", "damage", "export", "gather", "is_done", "load", "losses",
    "method_comparison", "result", "row", "statistics", "without_paths",
]  # fmt: skip
