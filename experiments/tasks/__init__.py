"""Tasks by name: data, metric and the family of models that learns them; each split is read only when asked for."""

from experiments.tasks.catalogue import get, names
from experiments.tasks.images import check_pictures
from experiments.tasks.instruction import mt_bench
from experiments.tasks.rows import text_columns
from experiments.tasks.splits import HUB, Splits
from experiments.tasks.task import (
    METRICS,
    OF_CLASSES,
    OF_NUMBERS,
    RANGES,
    SPLITS,
    Task,
    constant,
    is_score,
    listed,
    score,
)

__all__ = [
    "HUB", "METRICS", "OF_CLASSES", "OF_NUMBERS", "RANGES", "SPLITS", "Splits", "Task", "check_pictures",
    "constant", "get", "is_score", "listed", "mt_bench", "names", "score", "text_columns",
]  # fmt: skip
