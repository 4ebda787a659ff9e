"""Training loss against the step, of the sweeps whose runs logged it."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis import style
from paper_figures.charts.parts import legend, missing, panels
from paper_figures.sources import NOT_RUN, Sweep


def draw(sweeps: Sequence[Sweep]) -> Figure:
    """One panel per sweep and task, one line per cell, the mean over its runs; more trained numbers, thicker line."""
    shown = [
        (sweep, task, part)
        for sweep in sweeps
        for task, part in sweep.cells.groupby("task", sort=False)
        # runs of few steps log no loss
        if sweep.curves["cell"].isin(part.index).any()
    ]
    if not shown:
        return missing(f"learning curves: {NOT_RUN}")
    figure, axes = panels(len(shown), 3, 1.9)
    for (sweep, task, part), panel in zip(shown, axes, strict=True):
        for order, (place, cell) in enumerate(part.sort_values("trained", kind="stable").iterrows()):
            line = sweep.curves[sweep.curves["cell"] == place]
            panel.plot(
                line["step"], line["loss"], color=style.colour(cell["projection"]), linewidth=0.5 + order / len(part)
            )
            panel.plot(
                line["step"].tail(1), line["loss"].tail(1), color=style.colour(cell["projection"]),
                marker=style.marker(cell["projection"]), markersize=3,
            )  # fmt: skip
        panel.set_title(f"{sweep.name}: {task}")
        panel.set_xlabel(
            f"optimiser step (mean of n = {int(part['seeds'].max())} runs;\nthicker: more trained numbers)"
        )
        panel.set_ylabel("training loss")
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    legend(figure, {name for _, _, part in shown for name in part["projection"]})
    return figure
