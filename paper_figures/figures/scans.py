"""Score against d, the learning rate, the rank and the number of training rows: published, and of our sweeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.names import method, model, task
from paper_figures import style
from paper_figures.cells import score_head, whole, with_numbers
from paper_figures.committed import NOT_RUN, Committed, Sweep, complete, one_task
from paper_figures.comparison import OURS, score
from paper_figures.panels import PUBLISHED, legend, missing, panels, say
from paper_figures.published import notes, of_table
from paper_figures.registry import Product, register
from paper_figures.sizes import against, logarithmic, only_at
from paper_figures.typesetting import Table

# published scores of Llama-3.1-8B by d and learning rate
_GRID = "llama31_8b"


@register("score_against_d")
def against_d(committed: Committed) -> Sequence[Product]:
    """The published scores by d, a line for each rate, beside ours."""
    published, sweep = of_table(_GRID), committed.sweep("score_against_d")
    figure, axes = panels(2, 2, 2.6)
    _lines(axes[0], published[published["column"] == "GSM8K"], "d", "lr", lambda lr: f"lr {lr:g}")
    axes[0].legend(loc="lower right", fontsize=5)
    axes[0].set_title("published: Llama-3.1-8B")
    axes[0].set_xlabel("trained numbers (n = 1 seed, no interval published)")
    axes[0].set_ylabel("GSM8K accuracy, %")
    _ours(figure, axes[1], sweep, "trained", "trained numbers")
    return _table(_GRID, "Score against d", "trained", "trained numbers", sweep), figure


@register("learning_rates")
def rates(committed: Committed) -> Sequence[Product]:
    """The published scores by learning rate, a line for each size; the table is that of the scores against d."""
    published = of_table(_GRID)
    columns = list(published["column"].unique())
    figure, axes = panels(len(columns), 2, 2.6)
    for column, panel in zip(columns, axes, strict=True):
        _lines(panel, published[published["column"] == column], "lr", "d", lambda d: f"{d:,.0f}")
        panel.set_title(f"published: Llama-3.1-8B, {column}")
        panel.set_xlabel("learning rate (n = 1 seed, no interval published)")
        panel.set_ylabel(f"{column} accuracy, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return [figure]


def _lines(axes: Axes, values: pd.DataFrame, x: str, by: str, name: Callable[[float], str]) -> None:
    """Published values against x, joined where method and `by` are equal: the larger, the darker."""
    groups = list(values.sort_values(x).groupby([by, "method"]))
    for place, ((key, label), own) in enumerate(groups):
        grey = str(round(0.75 * (1 - place / len(groups)), 3))
        axes.plot(
            own[x], own["value"], color=grey, marker=style.MARKERS[place], markerfacecolor="white",
            label=f"{label}, {name(key)}",
        )  # fmt: skip
    logarithmic(axes)


@register("score_against_r")
def against_r(committed: Committed) -> Sequence[Product]:
    """The published scores at two ranks beside ours."""
    published, sweep = of_table("score_against_r"), committed.sweep("score_against_r")
    figure, axes = panels(2, 2, 2.1)
    axes[0].plot(
        published["r"], published["value"], color=PUBLISHED, marker="o", markerfacecolor="white", linestyle="none"
    )
    axes[0].set_xticks(published["r"])
    axes[0].set_ylim(0, 1.15 * published["value"].max())
    axes[0].set_title(f"published: Llama-3.2-3B, {published['method'].iloc[0]}, d = {int(published['d'].iloc[0]):,}")
    axes[0].set_xlabel("rank r (n = 1 seed, no interval published)")
    axes[0].set_ylabel("GSM8K accuracy, %")
    _ours(figure, axes[1], sweep, "r", "rank r")
    if sweep is not None:
        only_at(axes[1], sweep.cells["r"])
    return _table("score_against_r", "Score against the rank", "r", "r", sweep), figure


@register("score_against_rows")
def against_rows(committed: Committed) -> Sequence[Product]:
    """Score against the number of training rows, every method at one budget; nothing is published of it."""
    sweep = committed.sweep("score_against_rows")
    title = "Score against the number of training rows"
    table = _table("score_against_rows", title, "train_size", "training rows", sweep)
    if sweep is None:
        return table, missing(f"score against training rows: {NOT_RUN}")
    figure, (panel,) = panels(1, 1, 2.6, style.COLUMN)
    against(panel, sweep.cells, "train_size", "training rows")
    only_at(panel, sweep.cells["train_size"])
    panel.set_title(_where(sweep))
    legend(figure, set(sweep.cells["projection"]), 4)
    return table, figure


def _where(sweep: Sweep) -> str:
    return f"{model(sweep.cells['model'].iloc[0])}, {task(one_task(sweep.cells, sweep.name))}"


def _ours(figure: Figure, axes: Axes, sweep: Sweep | None, key: str, label: str) -> None:
    """The panel beside the published one, with its legend."""
    if sweep is None:
        say(axes, f"ours: {NOT_RUN}")
        return
    against(axes, sweep.cells, key, label)
    axes.set_title(f"ours: {_where(sweep)}")
    legend(figure, set(sweep.cells["projection"]))


def _table(name: str, title: str, key: str, head: str, sweep: Sweep | None) -> Table:
    """Published points, then every cell of ours."""
    rows = [
        ["published", value["method"], whole(value["d" if key == "trained" else key]), f"{value['lr']:g}",
         value["column"], value["text"]]
        for value in of_table(name).to_dict("records")
    ]  # fmt: skip
    if sweep is not None:
        complete(sweep.cells, key)  # or raises
        for _, cell in sweep.cells.sort_values(["projection", key], kind="stable").iterrows():
            rows.append(
                [f"ours, {model(cell['model'])}", method(cell["projection"]), whole(cell[key]), f"{cell['lr']:g}",
                 task(cell["task"]), score(cell).text]
            )  # fmt: skip
    known, unknown = with_numbers(rows, labels=5, named=3)
    below = [*([f"Ours: {NOT_RUN}."] if sweep is None else []), *unknown, *notes(name), OURS]
    return Table(title, ["block", "method", head, "lr", "task", score_head(sweep)], known, below)
