"""The picture: singular values of every P, lengths along real directions, and a learned P on its way."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.names import method, variant
from paper_figures import style
from paper_figures.panels import guide

KINDS = (("random", "o"), ("adapters", "s"), ("gradients", "^"))
_ROW = 0.14


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Panels one above the other: names are long, so at the width of the page."""
    verdicts = tables["verdicts"]
    measured = verdicts[verdicts["verdict"] != "not measured"]
    pairs, path = tables.get("distortion", pd.DataFrame()), tables.get("training", pd.DataFrame())
    path = path[path["learned"]] if len(path) else path
    panels = [(_values, measured, len(measured))] if len(measured) else []
    if len(pairs) and "pairs" in pairs:
        pairs = pairs.dropna(subset=["pairs"])
        panels.append((_lengths, pairs, pairs["projection"].nunique()))
    if len(path):
        panels.append((_learned, path, 10))
    heights = [0.8 + _ROW * rows for _, _, rows in panels]
    figure, axes = plt.subplots(
        max(1, len(panels)), 1, figsize=(0.75 * style.PAGE, sum(heights) or 1.0), squeeze=False,
        height_ratios=heights or [1.0],
    )  # fmt: skip
    for (panel, rows, _), place in zip(panels, axes[:, 0], strict=False):
        panel(place, rows)
    return figure


def _values(axes: Axes, rows: pd.DataFrame) -> None:
    guide(axes, 1)
    for position, row in enumerate(rows.itertuples()):
        colour = style.colour(row.projection)
        ends = [max(row.sigma_min, 1e-3), row.sigma_max]
        axes.plot(ends, [position] * 2, color=colour, marker="o", markersize=3, linewidth=2)
    axes.set_xscale("log")
    labels = [f"{variant(row.variant)}: {row.verdict}" for row in rows.itertuples()]
    axes.set_yticks(range(len(rows)), labels, fontsize=5)
    axes.invert_yaxis()
    axes.set_xlabel("singular values of P, least to largest (no unit, n = 1 seed)")
    axes.set_title(f"D = {style.span(rows['D'])}, d = {style.span(rows['d'])}", loc="left")


def _lengths(axes: Axes, rows: pd.DataFrame) -> None:
    names = list(dict.fromkeys(rows["projection"]))
    for shift, (kind, marker) in zip((-0.25, 0.0, 0.25), KINDS, strict=True):
        mine = rows[rows["pairs"] == kind]
        y = [names.index(name) + shift for name in mine["projection"]]
        bars = [mine["mean"] - mine["least"], mine["largest"] - mine["mean"]]
        colours = [style.colour(name) for name in mine["projection"]]
        axes.errorbar(mine["mean"], y, xerr=bars, fmt="none", ecolor=colours, elinewidth=0.8)
        label = f"{kind}, n = {int(mine['n'].max())}" if len(mine) else kind
        axes.scatter(mine["mean"], y, marker=marker, s=9, c=colours, label=label)
    guide(axes, 1)
    axes.set_yticks(range(len(names)), [method(name) for name in names], fontsize=5)
    axes.invert_yaxis()
    axes.set_xlabel("||P(x - y)|| / ||x - y||: mean, least and largest")
    axes.set_title(f"D = {style.span(rows['D'].dropna())}, d = {style.span(rows['d'].dropna())}", loc="left")
    axes.legend(loc="upper right")


def _learned(axes: Axes, rows: pd.DataFrame) -> None:
    for name, mine in rows.groupby("projection", sort=False):
        axes.plot(mine["step"], mine["rms"], **style.line(name))
    axes.set_xlabel("training steps")
    axes.set_ylabel("||P'P - I||_F / sqrt(d)")
    axes.set_title("P that is learned", loc="left")
    axes.legend()
