"""Tables and figures by the name of their files: every file of `figures/` registers what it makes."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from experiments.errors import ExperimentError
from paper_figures.committed import Committed
from paper_figures.typesetting import Table

Product = Table | Figure
Maker = Callable[[Committed], Sequence[Product]]
_makers: dict[str, Maker] = {}


def register(name: str) -> Callable[[Maker], Maker]:
    """Decorator of a function that makes a table, a figure or both out of what is committed.

    Raises ExperimentError if the name belongs to another file.
    """

    def decorate(make: Maker) -> Maker:
        taken = _makers.get(name, make).__module__
        if taken != make.__module__:
            raise ExperimentError(f"figures: the name {name!r} must be free, got that of {taken}. Choose another.")
        _makers[name] = make
        return make

    return decorate


def makers() -> dict[str, Maker]:
    """Everything that can be made, in the order of the names."""
    folder = importlib.import_module("paper_figures.figures")
    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{folder.__name__}.{module.name}")
    return dict(sorted(_makers.items()))
