"""Tables and figures by name: those of every file of `figures/`, of entry points `uniproj.figures`, and of plugins."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from experiments.errors import ExperimentError
from paper_figures.committed import Committed
from paper_figures.typesetting import Table
from uniproj import plugins

ENTRY_POINTS = "uniproj.figures"
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
    plugins.discover("paper_figures.figures", ENTRY_POINTS, register)
    return dict(sorted(_makers.items()))
