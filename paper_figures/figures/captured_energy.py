"""How much of a trained LoRA each projection can represent, beside d / D."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from paper_figures.committed import NOT_RUN, Committed
from paper_figures.figures.reconstruction import ENERGIES, ENERGY, draw_energy
from paper_figures.panels import LINE, missing, panels, say
from paper_figures.registry import register

TABLE = "reconstruction/reconstruction-energy.csv"


@register("captured_energy")
def make(committed: Committed) -> Sequence[Figure]:
    """From the committed table of `analysis.reconstruction`."""
    return [draw(committed.read(TABLE, "projection", "random", *ENERGIES, "D"))]


def draw(energy: pd.DataFrame | None) -> Figure:
    """A panel per metric, a line per projection, a point per d."""
    if energy is None or energy["factor"].isna().all():
        return missing(f"captured energy: {NOT_RUN}")
    rows = energy.dropna(subset=["factor"])
    figure, axes = panels(len(ENERGIES), len(ENERGIES), 1.0 + LINE * rows["projection"].nunique())
    for key, panel in zip(ENERGIES, axes, strict=True):
        if rows[key].isna().all():
            panel.set_title(ENERGIES[key])
            say(panel, NOT_RUN)
            continue
        draw_energy(panel, rows, key, panel is axes[0])
        panel.set_xlabel(ENERGY)
    figure.supxlabel(f"D = {int(rows['D'].iloc[0]):,}; n = 1 adapter, no interval", fontsize=7)
    return figure
