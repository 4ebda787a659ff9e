"""Gram matrices P^T P as heat maps, one per projection of the registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

import uniproj
from analysis import cards
from experiments.names import method
from paper_figures.committed import Committed
from paper_figures.panels import panels
from paper_figures.registry import register

_ACROSS = 6
COLOURS, SCALE = "PuOr", Normalize(-1, 1)


@register("gram")
def make(_: Committed) -> Sequence[Figure]:
    """Of the small instance of every projection."""
    return [draw({name: cards.gram(cards.instance(name)) for name in uniproj.names()})]


def draw(grams: Mapping[str, np.ndarray]) -> Figure:
    """The first columns of each, scaled to its own largest entry: 1 is purple, -1 brown, 0 white."""
    figure, axes = panels(len(grams), _ACROSS, 1.38)
    for (name, values), panel in zip(grams.items(), axes, strict=True):
        most = float(np.abs(values).max())
        panel.imshow(values / most, cmap=COLOURS, norm=SCALE, interpolation="nearest", rasterized=True)
        panel.set_title(method(name), fontsize=6)
        panel.set_xticks([])
        panel.set_yticks([])
        panel.grid(False)
        panel.set_xlabel(f"max = {most:.3g}", fontsize=6)
    bar = figure.colorbar(ScalarMappable(SCALE, COLOURS), ax=axes, shrink=0.5, pad=0.01)
    bar.set_label("entry of $P^T P$ / its max", fontsize=6)
    bar.ax.tick_params(labelsize=6)
    figure.supxlabel(f"first 64 columns; {cards.SPACE}; n = 1 seed", fontsize=6)
    return figure
