"""The ablations: score of each variant of Uni-LoRA, and what it differs from Uni-LoRA's, paired by seed."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from experiments import names
from experiments.names import method
from paper_figures import style
from paper_figures.cells import score_head, task_heads, with_numbers
from paper_figures.committed import NOT_RUN, Committed, Sweep
from paper_figures.comparison import OURS, Place, score_at
from paper_figures.panels import LINE, MISSING, guide, lines_of, missing, panels, point
from paper_figures.published import notes
from paper_figures.registry import Product, register
from paper_figures.typesetting import Table

REFERENCE = "unilora"
_TITLE = "Variants of Uni-LoRA at one budget"


@register("ablations")
def make(committed: Committed) -> Sequence[Product]:
    """From the sweep at one budget."""
    sweep = committed.sweep("glue_budget")
    if sweep is None:
        below = [f"Ours: {NOT_RUN}.", *notes("ablations")]
        return Table(_TITLE, ["block", "projection", score_head(None)], [], below), missing(f"ablations: {NOT_RUN}")
    variants = [name for name in style.order(sweep.cells["projection"].unique()) if name.startswith(f"{REFERENCE}_")]
    differences = sweep.differences(REFERENCE)
    return table(sweep, variants, differences), draw(variants, differences)


def table(sweep: Sweep, variants: Sequence[str], differences: pd.DataFrame) -> Table:
    """Score of each variant in the sweep, and its paired difference to Uni-LoRA's, by task."""
    tasks = task_heads(sweep)
    rows = [
        ["ours, score", method(name), *(score_at(sweep, Place(task), name).text for task in tasks)]
        for name in (REFERENCE, *variants)
    ]
    for name in variants:
        own = differences[differences["projection"] == name].set_index("task")
        gaps = [_gap(own.loc[task]) if task in own.index else NOT_RUN for task in tasks]
        rows.append([f"ours, difference to {method(REFERENCE)}", method(name), *gaps])
    known, unknown = with_numbers(rows)
    below = [
        "Differences are paired by seed, x 100, with Student's 95 % interval.",
        *unknown,
        *notes("ablations"),
        OURS,
    ]
    return Table(_TITLE, ["block", "projection", *tasks.values()], known, below)


def _gap(row: pd.Series) -> str:
    return (
        f"{100 * row['difference']:+.1f} [{100 * row['t_low']:+.1f}, {100 * row['t_high']:+.1f}] (n = {row['pairs']})"
    )


def draw(variants: Sequence[str], differences: pd.DataFrame) -> Figure:
    """One panel per task; a vertical line at no difference."""
    shown = differences[differences["projection"].isin(variants)]
    if shown.empty:
        return missing(f"ablations: {NOT_RUN}")
    tasks = list(dict.fromkeys(shown["task"]))
    figure, axes = panels(len(tasks), 4, 0.8 + LINE * 2 * len(variants))
    for place, (task, panel) in enumerate(zip(tasks, axes, strict=True)):
        lines_of(panel, [method(name) for name in variants], place % 4 == 0)
        guide(panel, 0)
        own = shown[shown["task"] == task].set_index("projection")
        for line, name in enumerate(variants):
            if name in own.index:
                found = own.loc[name]
                point(panel, 100 * found["difference"], line, name, 100 * found["t_low"], 100 * found["t_high"])
            else:
                left = panel.get_yaxis_transform()
                panel.text(0.05, line, NOT_RUN, va="bottom", fontsize=5.5, color=MISSING, transform=left)
        pairs = int(own["pairs"].max())
        panel.set_title(f"{names.task(task)}, n = {pairs} pairs")
        panel.set_xlabel(f"score - {method(REFERENCE)}'s,\nx 100 (95 % t interval)")
    return figure
