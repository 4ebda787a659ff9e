"""The score against the bytes of the adapter's file, of every study that varies them."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from experiments.names import task
from paper_figures.committed import NOT_RUN, Committed, Sweep, one_task
from paper_figures.panels import legend, missing, panels
from paper_figures.registry import register
from paper_figures.sizes import against


@register("score_against_bytes")
def make(committed: Committed) -> Sequence[Figure]:
    """Of every study."""
    return [draw(committed.sweeps)]


def draw(sweeps: Sequence[Sweep]) -> Figure:
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
