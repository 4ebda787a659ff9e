"""Singular values of every P, and the stable ranks of the updates that it produces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from experiments import names
from paper_figures import style
from paper_figures.committed import NOT_RUN, Committed
from paper_figures.panels import missing
from paper_figures.registry import register

NEEDED = {
    "spectrum": ("projection", "variant", "D", "d", "delta_W_stable_rank"),
    "values": ("projection", "variant", "place", "sigma"),
}
APART = 0.7


@register("spectrum")
def make(committed: Committed) -> Sequence[Figure]:
    """From the committed tables of `analysis.spectrum`."""
    found = committed.read_analysis("spectrum", NEEDED)
    return [missing(f"spectrum: {NOT_RUN}") if found is None else draw(found)]


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Singular values of the defaults in their order, and the stable rank of the delta W they produce."""
    curves, rows = tables["values"], tables["spectrum"]
    figure, (above, below) = plt.subplots(2, 1, figsize=(style.COLUMN, 5.6), height_ratios=[3, 2])
    if not len(curves):
        return figure
    firsts = curves.drop_duplicates("projection")["variant"]
    for order, variant in enumerate(firsts):
        mine = curves[curves["variant"] == variant]
        name = mine["projection"].iloc[0]
        shown = mine["sigma"].clip(lower=1e-3)
        # markers of equal lines stand beside each other, in parts of the diagonal
        beside = (APART * order / len(firsts), APART)
        above.plot(mine["place"], shown, markevery=beside, **style.line(name))
    above.set_yscale("log")
    above.set_xlabel("place in the order, largest first (fraction of d)")
    above.set_ylabel("singular value of P (no unit, n = 1 seed)")
    figure.legend(*above.get_legend_handles_labels(), ncols=3, fontsize=5, loc="outside upper center")
    above.set_title(f"D = {style.span(rows['D'].dropna())}, d = {style.span(rows['d'].dropna())}", loc="left")
    known = rows[rows["variant"].isin(firsts)].dropna(subset=["delta_W_stable_rank"])
    labels, colours = (list(known["projection"].map(of)) for of in (names.method, style.colour))
    below.bar(labels, known["delta_W_stable_rank"], color=colours)
    below.tick_params(axis="x", rotation=90)
    below.set_ylabel("stable rank of delta W\n(mean over modules and 4 draws)")
    return figure
