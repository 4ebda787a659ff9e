"""What training costs: step time, memory and stored bytes, published and ours."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments import names
from experiments.names import method
from paper_figures.cells import NOT_MEASURED, ratio, scaled, whole
from paper_figures.committed import NOT_RUN, Committed
from paper_figures.panels import LINE, MISSING, guide, lines_of, panels, point, say
from paper_figures.published import notes, of_table, tables
from paper_figures.registry import Product, register
from paper_figures.typesetting import Table

_SECONDS, _UNKNOWN = "5,000 steps", "-"


@register("training_cost")
def make(committed: Committed) -> Sequence[Product]:
    """PEFT's benchmark, then ours per base."""
    published = of_table("training_cost")
    return table(published, committed.costs), draw(published, committed.costs)


def table(published: pd.DataFrame, costs: pd.DataFrame | None) -> Table:
    """A row per method and base."""
    units = tables()["training_cost"]["units"]
    rows = []
    for label, own in published.groupby("method", sort=False):
        found = dict(zip(own["column"], own["text"], strict=True))
        rows.append(["published", label, own["trained"].iloc[0], *(found.get(column, _UNKNOWN) for column in units)])
    for row in () if costs is None else costs.itertuples():
        rows.append([f"ours, {names.model(row.base)}, CPU", method(row.method), whole(row.trained), _UNKNOWN,
                     ratio(row, "step_ratio"), _UNKNOWN, scaled(row.peak_bytes, 2**30),
                     scaled(row.file_bytes, 1e6)])  # fmt: skip
    below = [*([f"Ours: {NOT_RUN}."] if costs is None else []), *notes("training_cost")]
    ours = (
        "Ours: median of paired ratios with its 95 % interval; peak memory of a training step beyond the bare base. "
        "The published memory is all that the process reserved. n is in results/overhead. -: not known to us."
    )
    heads = ["block", "method", "trained", *(f"{column}, {unit}" for column, unit in units.items())]
    return Table("Cost of training", heads, rows, [*below, ours])


def draw(published: pd.DataFrame, costs: pd.DataFrame | None) -> Figure:
    """Seconds of PEFT's benchmark, and step time over LoRA's, ours on each base."""
    ours = [] if costs is None else [(base, own) for base, own in costs.groupby("base", sort=False)]
    values = published[published["column"] == _SECONDS].sort_values("value")
    most = max([len(values), *(len(own) for _, own in ours)])
    count = 1 + max(1, len(ours))
    figure, axes = panels(count, count, 0.8 + LINE * most)
    lines_of(axes[0], list(values["method"]))
    for place, value in enumerate(values["value"]):
        point(axes[0], value, place, None)
    axes[0].set_title("published: PEFT,\nLlama-3.2-3B, GPU")
    axes[0].set_xlabel("seconds of 5,000 steps\n(n = 1 run)")
    if not ours:
        say(axes[1], f"ours: {NOT_RUN}")
    for (base, own), panel in zip(ours, axes[1:], strict=False):
        _ratios(panel, own, f"ours, CPU:\n{names.model(base)}")
    return figure


def _ratios(axes: Axes, rows: pd.DataFrame, title: str) -> None:
    rows = rows.sort_values("step_ratio", na_position="last")
    lines_of(axes, [method(name) for name in rows["method"]])
    for place, row in enumerate(rows.itertuples()):
        if pd.isna(row.step_ratio):
            axes.text(1, place, NOT_MEASURED, fontsize=5.5, color=MISSING, va="center")
        else:
            point(axes, row.step_ratio, place, row.method, row.step_ratio_low, row.step_ratio_high)
    guide(axes, 1)
    if rows["step_ratio"].max() > 2:
        axes.set_xscale("log")
        axes.set_xticks([1, 1.5, 2, 3], ["1", "1.5", "2", "3"])
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title(title)
    axes.set_xlabel(f"step time / LoRA's\n(n = {int(rows['step_pairs'].min())} pairs, median,\n95 % interval)")
