"""A panel of scores against a size or a setting, on a logarithmic axis."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from experiments.names import method
from experiments.records.statistics import COMPLETE, unit
from paper_figures import style
from paper_figures.cells import whole
from paper_figures.committed import complete, one_task
from paper_figures.comparison import score
from paper_figures.panels import MISSING, point, say

# on a logarithmic axis, in decades: points nearer than this are set side by side
APART = 0.035
# of the height of a panel: a line that names a cell which is not drawn
NAMED = 0.08


def against(axes: Axes, cells: pd.DataFrame, key: str, label: str) -> None:
    """Complete cells of one task against a size, others and those of size 0 by name; a method's points are joined where
    each has its own size."""
    one_task(cells, label)
    counted = complete(cells, key).sort_values(key)
    usable, nothing = counted[counted[key] > 0], counted[counted[key] == 0]
    if usable.empty:
        say(axes, "no complete cell")
        return
    places = _beside(usable[key])
    for name, own in usable.assign(x=places).groupby("projection", sort=True):
        for cell in own.itertuples():
            low, high = 100 * cell.score_low, 100 * cell.score_high
            point(axes, cell.x, 100 * cell.score, name, low, high, upright=True)
        if own[key].is_unique:
            look = {"color": style.colour(name), "linestyle": style.dash(name), "linewidth": 0.8, "alpha": 0.6}
            axes.plot(own["x"], 100 * own["score"], **look)
    logarithmic(axes)
    axes.set_ylabel(unit(usable["metric"].iloc[0]))
    at_0 = [f"{method(cell.projection)}: {100 * cell.score:.1f} at 0" for cell in nothing.itertuples()]
    _name(axes, [*_lost(cells, key), *at_0])
    axes.set_xlabel(f"{label}, equal ones side by side\n(mean of n = {style.span(usable['n'])} seeds, 95 % t interval)")


def _lost(cells: pd.DataFrame, key: str) -> list[str]:
    """A line for each reason why cells are not drawn: their methods, those of several cells with the size."""
    is_one_of_several = cells["projection"].duplicated(keep=False)
    found: dict[str, list[str]] = {}
    for place, cell in cells[cells["status"] != COMPLETE].iterrows():
        # one that failed may not know its size
        at = f" at {whole(cell[key])}" if is_one_of_several[place] and pd.notna(cell[key]) else ""
        found.setdefault(score(cell).text, []).append(f"{method(cell['projection'])}{at}")
    return [f"{', '.join(names)}: {reason}" for reason, names in found.items()]


def _name(axes: Axes, lines: Sequence[str]) -> None:
    """The cells that are not drawn, in lines of their own above all points and intervals."""
    low, high = axes.get_ylim()
    height = NAMED * (high - low)
    axes.set_ylim(low, high + height * len(lines))
    for line, text in enumerate(lines, start=1):
        place = (0.02, high + height * (len(lines) - line))
        axes.annotate(text, place, xycoords=axes.get_yaxis_transform(), va="bottom", fontsize=5.5, color=MISSING)


def _beside(sizes: pd.Series) -> list[float]:
    """Places of sorted sizes: equal ones side by side around their own, so that no interval hides another."""
    groups: list[list[float]] = []
    for size in sizes:
        if groups and size < groups[-1][0] * 10**APART:
            groups[-1].append(size)
        else:
            groups.append([size])
    return [
        group[0] * 10 ** (APART * (place - (len(group) - 1) / 2)) for group in groups for place in range(len(group))
    ]


def logarithmic(axes: Axes) -> None:
    """A logarithmic axis with few ticks, written as 3k and 10M."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(
        LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 3.0) if high / low > 8 else (1, 2, 5))
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def only_at(axes: Axes, values: pd.Series) -> None:
    """Ticks at the few values that were chosen, and no others."""
    chosen = sorted(set(values))
    axes.set_xticks(chosen, [f"{value:g}" for value in chosen])
    axes.xaxis.set_minor_locator(NullLocator())


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
