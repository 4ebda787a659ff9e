"""What each P keeps of the gradient, and the loss along a direction of its subspace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.landscape.measure import LOSS_BATCHES
from experiments import names
from paper_figures import style
from paper_figures.committed import NOT_RUN, Committed
from paper_figures.panels import FACTS, guide, missing
from paper_figures.registry import register

NEEDED = {
    "gradients": ("projection", "D", "d", "mean", "least", "largest", "random", "isometric", "n"),
    "losses": ("projection", "direction", "t", "loss"),
}


@register("landscape")
def make(committed: Committed) -> Sequence[Figure]:
    """From the committed tables of `analysis.landscape`."""
    found = committed.read_analysis("landscape", NEEDED)
    return [missing(f"landscape: {NOT_RUN}") if found is None else draw(found)]


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """||P^T g|| / ||g|| of every projection beside sqrt(d / D), and the loss along the first direction."""
    norms = tables["gradients"].dropna(subset=["mean"]) if "mean" in tables["gradients"] else pd.DataFrame()
    figure, (above, below) = plt.subplots(2, 1, figsize=(style.COLUMN, 7.4), height_ratios=[3, 2])
    if not len(norms):
        return figure
    place = np.arange(len(norms))
    colours = [style.colour(name) for name in norms["projection"]]
    above.errorbar(
        norms["mean"], place, xerr=[norms["mean"] - norms["least"], norms["largest"] - norms["mean"]],
        fmt="none", ecolor=colours,
    )  # fmt: skip
    # the markers are those of the losses below
    for y, row in zip(place, norms.to_dict("records"), strict=True):
        look = {"color": style.colour(row["projection"]), "marker": style.marker(row["projection"])}
        above.scatter(row["mean"], y, s=14, **look)
    above.scatter([], [], s=14, color=FACTS, label=f"measured, n = {int(norms['n'].min())} batches")
    above.scatter(norms["random"], place, marker="|", color=FACTS, s=40, label="sqrt(d / D)")
    guide(above, 1)
    labels = [f"{names.method(r.projection)}{'' if r.isometric else ' *'}" for r in norms.itertuples()]
    above.set_yticks(place, labels, fontsize=5.5)
    above.invert_yaxis()
    above.set_xscale("log")
    above.set_xlabel("||P'g|| / ||g||: mean, least and largest\n(* P is not isometric)")
    figure.legend(*above.get_legend_handles_labels(), ncols=2, loc="outside upper center")
    losses = tables["losses"][tables["losses"]["direction"] == 0]
    # in the order of the lines where they end
    for name in losses[losses["t"] == losses["t"].max()].sort_values("loss", ascending=False)["projection"]:
        mine = losses[losses["projection"] == name]
        below.plot(mine["t"], mine["loss"], markersize=3, linewidth=0.8, **style.line(name))
    figure.legend(*below.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=5, handlelength=4)
    below.set_xlabel("step along one direction\n(lengths of theta_D)")
    below.set_ylabel(f"loss (nats per row),\nn = {LOSS_BATCHES} batches")
    above.set_title(f"D = {style.span(norms['D'])}, d = {style.span(norms['d'])}", loc="left")
    return figure
