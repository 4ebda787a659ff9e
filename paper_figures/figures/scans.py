"""Score against d, the rank and the number of training rows: published, and of our sweep of that name."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.names import method, model, task
from paper_figures import style
from paper_figures.cells import score_head, whole
from paper_figures.committed import NOT_AVAILABLE, NOT_RUN, Committed, Sweep, complete, one_task
from paper_figures.comparison import OURS, score
from paper_figures.panels import PUBLISHED, legend, missing, panels, say
from paper_figures.published import notes, of_table
from paper_figures.registry import Product, register
from paper_figures.sizes import against, logarithmic, only_at
from paper_figures.typesetting import Table


@register("score_against_d")
def against_d(committed: Committed) -> Sequence[Product]:
    """The published scan of d beside ours."""
    published, sweep = of_table("score_against_d"), committed.sweep("score_against_d")
    figure, axes = panels(2, 2, 2.3)
    axes[0].plot(published["d"], published["value"], color=PUBLISHED, marker="o", markerfacecolor="white")
    logarithmic(axes[0])
    axes[0].set_title("published: Llama-3.1-8B, Uni-LoRA")
    axes[0].set_xlabel("d (n = 1 seed, no interval published)")
    axes[0].set_ylabel("GSM8K accuracy, %")
    _ours(figure, axes[1], sweep, "trained", "trained numbers")
    return _table("score_against_d", "Score against d", "trained", "trained numbers", sweep), figure


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
    axes[0].set_title(f"published: Llama-3.2-3B, Uni-LoRA, d = {int(published['d'].iloc[0]):,}")
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
        ["published", value["method"], whole(value["d" if key == "trained" else key]), value["column"],
         f"{value['value']:g}"]
        for value in of_table(name).to_dict("records")
    ] or [["published", "all", *[NOT_AVAILABLE] * 3]]  # fmt: skip
    if sweep is None:
        rows.append(["ours", "all", NOT_RUN, NOT_RUN, NOT_RUN])
    else:
        complete(sweep.cells, key)  # or raises
        for _, cell in sweep.cells.sort_values(["projection", key], kind="stable").iterrows():
            rows.append(
                [f"ours, {model(cell['model'])}", method(cell["projection"]), whole(cell[key]), task(cell["task"]),
                 score(cell).text]
            )  # fmt: skip
    return Table(title, ["block", "method", head, "task", score_head(sweep)], rows, [*notes(name), OURS])
