"""Tasks by name: data, metric and the family of models that learns them; each split is read only when asked for."""

from experiments.tasks.catalogue import get, names
from experiments.tasks.images import check_pictures
from experiments.tasks.rows import text_columns
from experiments.tasks.sources import HUB, Source
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
    "HUB", "METRICS", "OF_CLASSES", "OF_NUMBERS", "RANGES", "SPLITS", "Source", "Task", "check_pictures",
    "constant", "get", "is_score", "listed", "names", "score", "text_columns",
]  # fmt: skip
