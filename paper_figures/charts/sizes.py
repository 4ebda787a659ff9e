"""Score against what is trained or stored."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from analysis import style
from experiments.names import method, model, task
from experiments.records.statistics import COMPLETE, unit
from paper_figures.charts.parts import MISSING, PUBLISHED, legend, missing, panels, point, say
from paper_figures.sources import NOT_RUN, Sweep, complete, one_task

# on a logarithmic axis, in decades: points nearer than this are set side by side
APART = 0.035
# of the height of a panel: a line that names a cell which is not drawn
NAMED = 0.08


def stored(sweeps: Sequence[Sweep]) -> Figure:
    """Score against the bytes of the adapter's file, one panel per sweep and task.

    A sweep in which a method stores the same bytes twice varies something else, such as training rows, and is left out.
    """
    tasks = [(sweep, part) for sweep in sweeps for _, part in sweep.cells.groupby("task", sort=False)]
    size = ["projection", "adapter_bytes"]
    shown = [(sweep, part) for sweep, part in tasks if not part.dropna(subset=size).duplicated(size).any()]
    if not shown:
        return missing(f"score against stored bytes: {NOT_RUN}")
    figure, axes = panels(len(shown), 3, 2.1)
    for (sweep, part), panel in zip(shown, axes, strict=True):
        against(panel, part, "adapter_bytes", "stored bytes")
        panel.set_title(f"{task(one_task(part, sweep.name))} ({sweep.name})")
    legend(figure, {name for _, part in shown for name in part["projection"]})
    return figure


def against(axes: Axes, cells: pd.DataFrame, key: str, label: str) -> None:
    """Complete cells of one task against a size, others by name; a method's points are joined where each has its own
    size."""
    one_task(cells, label)
    usable = complete(cells, key).sort_values(key)
    if usable.empty:
        say(axes, "no complete cell")
        return
    places = _beside(usable[key])
    for name, own in usable.assign(x=places).groupby("projection", sort=True):
        for cell in own.itertuples():
            low, high = 100 * cell.score_low, 100 * cell.score_high
            point(axes, cell.x, 100 * cell.score, name, low, high, upright=True)
        if own[key].is_unique:
            axes.plot(
                own["x"],
                100 * own["score"],
                color=style.colour(name),
                linestyle=style.dash(name),
                linewidth=0.8,
                alpha=0.6,
            )
    logarithmic(axes)
    counts = sorted(set(usable["n"]))
    seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    axes.set_ylabel(unit(usable["metric"].iloc[0]))
    _name_lost(axes, cells[cells["status"] != COMPLETE])
    axes.set_xlabel(f"{label}, equal ones side by side\n(mean of n = {seeds} seeds, 95 % t interval)")


def _name_lost(axes: Axes, lost: pd.DataFrame) -> None:
    """The cells that are not drawn, in lines of their own above all points and intervals."""
    low, high = axes.get_ylim()
    height = NAMED * (high - low)
    axes.set_ylim(low, high + height * len(lost))
    for line, cell in enumerate(lost.itertuples(), start=1):
        place, text = (0.02, high + height * (len(lost) - line)), f"{method(cell.projection)}: {cell.status}"
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


def _only_at(axes: Axes, values: pd.Series) -> None:
    """Ticks at the few values that were chosen, and no others."""
    chosen = sorted(set(values))
    axes.set_xticks(chosen, [f"{value:g}" for value in chosen])
    axes.xaxis.set_minor_locator(NullLocator())


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _place(sweep: Sweep) -> str:
    return f"{model(sweep.cells['model'].iloc[0])}, {task(one_task(sweep.cells, sweep.name))}"


def against_d(published: pd.DataFrame, sweep: Sweep | None) -> Figure:
    """The published scan of d beside ours."""
    figure, axes = panels(2, 2, 2.3)
    values = published[published["table"] == "score_against_d"]
    axes[0].plot(values["d"], values["value"], color=PUBLISHED, marker="o", markerfacecolor="white")
    logarithmic(axes[0])
    axes[0].set_title("published: Llama-3.1-8B, Uni-LoRA")
    axes[0].set_xlabel("d (n = 1 seed, no interval published)")
    axes[0].set_ylabel("GSM8K accuracy, %")
    if sweep is None:
        say(axes[1], f"ours: {NOT_RUN}")
        return figure
    against(axes[1], sweep.cells, "trained", "trained numbers")
    axes[1].set_title(f"ours: {_place(sweep)}")
    legend(figure, set(sweep.cells["projection"]))
    return figure


def against_r(published: pd.DataFrame, sweep: Sweep | None) -> Figure:
    """The published scores at two ranks beside ours."""
    figure, axes = panels(2, 2, 2.1)
    values = published[published["table"] == "score_against_r"]
    axes[0].plot(values["r"], values["value"], color=PUBLISHED, marker="o", markerfacecolor="white", linestyle="none")
    axes[0].set_xticks(values["r"])
    axes[0].set_ylim(0, 1.15 * values["value"].max())
    axes[0].set_title(f"published: Llama-3.2-3B, Uni-LoRA, d = {int(values['d'].iloc[0]):,}")
    axes[0].set_xlabel("rank r (n = 1 seed, no interval published)")
    axes[0].set_ylabel("GSM8K accuracy, %")
    if sweep is None:
        say(axes[1], f"ours: {NOT_RUN}")
        return figure
    against(axes[1], sweep.cells, "r", "rank r")
    _only_at(axes[1], sweep.cells["r"])
    axes[1].set_title(f"ours: {_place(sweep)}")
    legend(figure, set(sweep.cells["projection"]))
    return figure


def against_rows(sweep: Sweep | None) -> Figure:
    """Score against the number of training rows, every method at one budget."""
    if sweep is None:
        return missing(f"score against training rows: {NOT_RUN}")
    figure, (panel,) = panels(1, 1, 2.6, style.COLUMN)
    against(panel, sweep.cells, "train_size", "training rows")
    _only_at(panel, sweep.cells["train_size"])
    panel.set_title(_place(sweep))
    legend(figure, set(sweep.cells["projection"]), 4)
    return figure
