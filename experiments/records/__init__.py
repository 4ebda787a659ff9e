"""What finished runs say: the reader of their folders, the only statistics, and the files that are committed."""

from experiments.records.baseline import beats, marks
from experiments.records.committed import export
from experiments.records.reading import damage, is_done, load, load_runs, metrics, result, row
from experiments.records.statistics import cells, differences, paired, summary

__all__ = [
    "beats",
    "cells",
    "damage",
    "differences",
    "export",
    "is_done",
    "load",
    "load_runs",
    "marks",
    "metrics",
    "paired",
    "result",
    "row",
    "summary",
]
