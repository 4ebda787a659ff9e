"""What the figures share: panels, points with intervals, legends, and the words for what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paper_figures import style

FACTS = PUBLISHED = "#555555"
MISSING = "#777777"
LINE = 0.155


def panels(count: int, across: int, height: float, width: float = style.PAGE) -> tuple[Figure, list[Axes]]:
    """Panels row by row, `height` inches each; those beyond `count` are empty."""
    across = min(across, count)
    down = -(-count // across)
    figure, axes = plt.subplots(down, across, figsize=(width, down * height), squeeze=False)
    flat = list(axes.ravel())
    for unused in flat[count:]:
        unused.set_axis_off()
    return figure, flat[:count]


def missing(text: str) -> Figure:
    """A figure that says what is not there."""
    figure, (axes,) = panels(1, 1, 1.0)
    say(axes, text)
    return figure


def say(axes: Axes, text: str) -> None:
    """A panel that holds a sentence in place of data."""
    axes.text(0.5, 0.5, text, ha="center", va="center", color=MISSING, fontsize=7, transform=axes.transAxes)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)


def guide(axes: Axes, at: float, upright: bool = True) -> None:
    """A dashed line at the value with which the others are compared."""
    (axes.axvline if upright else axes.axhline)(at, color=FACTS, linewidth=0.8, linestyle="--")


def point(
    axes: Axes, x: float, y: float, name: str | None, low: float | None = None, high: float | None = None,
    upright: bool = False, label: str | None = None,
) -> None:  # fmt: skip
    """One point in the look of a projection (grey and hollow for a published one), with its interval."""
    colour, marker = (PUBLISHED, "o") if name is None else (style.colour(name), style.marker(name))
    value = y if upright else x
    error = [[value - low], [high - value]] if low is not None and high is not None and low == low else None
    axes.errorbar(
        x, y, yerr=error if upright else None, xerr=None if upright else error, fmt=marker, color=colour,
        capsize=1.5, elinewidth=0.9,
        markerfacecolor="white" if name is None else colour, label=label, linestyle="none",
    )  # fmt: skip


def heading(axes: Axes, text: str) -> None:
    """A heading that may be wider than its panel: the layout makes room for its height, and ignores its width."""
    axes.set_title(" ", loc="left")
    axes.annotate(
        text, (0, 1), xycoords="axes fraction", xytext=(0, 5), textcoords="offset points", fontsize=8
    ).set_in_layout(False)


def lines_of(axes: Axes, labels: Sequence[str], show: bool = True) -> None:
    """One horizontal line of the panel per label, the first at the top."""
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), labels if show else [""] * len(labels))
    axes.tick_params(axis="y", length=0)


def legend(figure: Figure, names: Iterable[str], columns: int = 6, lines: bool = False) -> None:
    """A legend of projections above the panels, with the dashes of their lines where they are drawn as lines."""
    looks = [style.line(name) | ({} if lines else {"linestyle": "none"}) for name in style.order(names)]
    handles = [Line2D([], [], **look) for look in looks]
    if handles:
        figure.legend(
            handles=handles, loc="outside upper center", ncols=columns, columnspacing=1.2, handletextpad=0.3,
            handlelength=3.0 if lines else 1.0,
        )  # fmt: skip
