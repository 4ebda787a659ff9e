"""The score against the number of training rows, every method at one budget."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from paper_figures import style
from paper_figures.committed import NOT_RUN, Committed, Sweep
from paper_figures.panels import legend, missing, panels
from paper_figures.published import of_table
from paper_figures.registry import Product, register
from paper_figures.sizes import against, only_at, scan, where


@register("score_against_rows")
def make(committed: Committed) -> Sequence[Product]:
    """From the sweep of this name."""
    published, sweep = of_table("score_against_rows"), committed.sweep("score_against_rows")
    return scan("Score against the number of training rows", "train_size", "training rows", published, sweep), draw(
        sweep
    )


def draw(sweep: Sweep | None) -> Figure:
    """Score against the number of training rows, every method at one budget."""
    if sweep is None:
        return missing(f"score against training rows: {NOT_RUN}")
    figure, (panel,) = panels(1, 1, 2.6, style.COLUMN)
    against(panel, sweep.cells, "train_size", "training rows")
    only_at(panel, sweep.cells["train_size"])
    panel.set_title(where(sweep))
    legend(figure, set(sweep.cells["projection"]), 4)
    return figure
