"""Training loss against the step, of the studies whose runs logged it."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.names import method, task
from paper_figures import style
from paper_figures.committed import NOT_RUN, Committed, Sweep
from paper_figures.panels import MISSING, legend, missing, panels
from paper_figures.registry import register


@register("learning_curves")
def make(committed: Committed) -> Sequence[Figure]:
    """Of every study."""
    return [draw(committed.sweeps)]


def draw(sweeps: Sequence[Sweep]) -> Figure:
    """One panel per sweep and task, one line per cell, the mean over its runs; more trained numbers, thicker line."""
    shown = [
        (sweep, name, part)
        for sweep in sweeps
        for name, part in sweep.cells.groupby("task", sort=False)
        # runs of few steps log no loss
        if sweep.curves["cell"].isin(part.index).any()
    ]
    if not shown:
        return missing(f"learning curves: {NOT_RUN}")
    figure, axes = panels(len(shown), 3, 2.0)
    for (sweep, name, part), panel in zip(shown, axes, strict=True):
        _panel(panel, sweep.curves, part)
        panel.set_title(f"{task(name)} ({sweep.name})")
    legend(figure, {name for _, _, part in shown for name in part["projection"]}, 5, lines=True)
    return figure


def _panel(axes: Axes, curves: pd.DataFrame, cells: pd.DataFrame) -> None:
    for order, (place, cell) in enumerate(cells.sort_values("trained", kind="stable").iterrows()):
        line, look = curves[curves["cell"] == place], style.line(cell["projection"])
        # a marker at the end of each line
        end = [len(line) - 1] if len(line) else []
        axes.plot(line["step"], line["loss"], **look, markersize=3, markevery=end, linewidth=0.6 + order / len(cells))
    stuck = [
        f"{method(cell.projection)}: {cell.did_not_train} of {cell.runs} did not train, left out"
        for cell in cells[cells["did_not_train"] > 0].itertuples()
    ]
    # the lines fall from the left
    axes.text(0.02, 0.02, "\n".join(stuck), transform=axes.transAxes, va="bottom", fontsize=5.5, color=MISSING)
    axes.set_xlabel(f"optimiser step (mean of n = {int(cells['n'].max())} runs;\nthicker: more trained numbers)")
    axes.set_ylabel("training loss")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
