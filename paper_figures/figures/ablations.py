"""The ablations: score of each partition, and what it differs from Uni-LoRA's, paired by seed."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from experiments import names
from experiments.names import method
from paper_figures.cells import score_head, task_heads
from paper_figures.committed import NOT_AVAILABLE, NOT_RUN, Committed, Sweep
from paper_figures.comparison import OURS, Place, score_at
from paper_figures.panels import LINE, MISSING, guide, lines_of, missing, panels, point
from paper_figures.published import notes
from paper_figures.registry import Product, register
from paper_figures.typesetting import Table

REFERENCE = "unilora"
_ABLATIONS = ("unilora_local", "unilora_nonuniform", "unilora_unnormalised")


@register("ablations")
def make(committed: Committed) -> Sequence[Product]:
    """From the sweep at one budget."""
    sweep = committed.sweep("glue_budget")
    differences = pd.DataFrame() if sweep is None else sweep.differences(REFERENCE)
    return table(sweep, differences), draw(sweep, differences)


def table(sweep: Sweep | None, differences: pd.DataFrame) -> Table:
    """Score of each ablation, and its paired difference to Uni-LoRA's, by task."""
    tasks, every = task_heads(sweep), (REFERENCE, *_ABLATIONS)
    rows = [["published", method(name), *[NOT_AVAILABLE] * max(1, len(tasks))] for name in every]
    if sweep is None:
        rows += [["ours", method(name), NOT_RUN] for name in every]
    else:
        for name in every:
            rows.append(["ours, score", method(name), *(score_at(sweep, Place(task), name).text for task in tasks)])
        for name in _ABLATIONS:
            own = differences[differences["projection"] == name].set_index("task")
            gaps = [_gap(own.loc[task]) if task in own.index else NOT_RUN for task in tasks]
            rows.append([f"ours, difference to {method(REFERENCE)}", method(name), *gaps])
    below = [*notes("ablations"), OURS, "Differences are paired by seed, x 100, with Student's 95 % interval."]
    heads = ["block", "projection", *(tasks.values() or [score_head(None)])]
    return Table("Local, non-uniform and unnormalised partitions", heads, rows, below)


def _gap(row: pd.Series) -> str:
    return (
        f"{100 * row['difference']:+.1f} [{100 * row['t_low']:+.1f}, {100 * row['t_high']:+.1f}] (n = {row['pairs']})"
    )


def draw(sweep: Sweep | None, differences: pd.DataFrame) -> Figure:
    """One panel per task; a vertical line at no difference."""
    if sweep is None or differences.empty:
        return missing(f"ablations: {NOT_RUN}")
    tasks = list(dict.fromkeys(differences["task"]))
    figure, axes = panels(len(tasks), 4, 0.8 + LINE * 2 * len(_ABLATIONS))
    for place, (task, panel) in enumerate(zip(tasks, axes, strict=True)):
        lines_of(panel, [method(name) for name in _ABLATIONS], place % 4 == 0)
        guide(panel, 0)
        own = differences[differences["task"] == task].set_index("projection")
        for line, name in enumerate(_ABLATIONS):
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
