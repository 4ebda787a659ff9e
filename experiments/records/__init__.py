"""What finished runs say: the reader of their folders, the only statistics, and the files that are committed."""

from experiments.records import baseline, gather, method_comparison, statistics
from experiments.records.committed import OUT, RECORDS, export
from experiments.records.reading import CHOICE, damage, is_done, load, losses, result, row

__all__ = [
    "CHOICE", "OUT", "RECORDS", "baseline", "damage", "export", "gather", "is_done", "load", "losses",
    "method_comparison", "result", "row", "statistics",
]  # fmt: skip
