"""Tasks by name: data, metric and the family of models that learns them; each split is read only when asked for."""

from experiments.tasks.catalogue import get, names
from experiments.tasks.task import SPLITS, Task

__all__ = ["SPLITS", "Task", "get", "names"]
