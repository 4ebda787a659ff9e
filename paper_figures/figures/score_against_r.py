"""The score against the rank: two published ones, and ours."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from paper_figures.committed import Committed, Sweep
from paper_figures.panels import PUBLISHED, panels
from paper_figures.published import of_table
from paper_figures.registry import Product, register
from paper_figures.sizes import only_at, ours, scan


@register("score_against_r")
def make(committed: Committed) -> Sequence[Product]:
    """From the sweep of this name."""
    published, sweep = of_table("score_against_r"), committed.sweep("score_against_r")
    return scan("Score against the rank", "r", "r", published, sweep), draw(published, sweep)


def draw(published: pd.DataFrame, sweep: Sweep | None) -> Figure:
    """The published scores at two ranks beside ours."""
    figure, axes = panels(2, 2, 2.1)
    axes[0].plot(
        published["r"], published["value"], color=PUBLISHED, marker="o", markerfacecolor="white", linestyle="none"
    )
    axes[0].set_xticks(published["r"])
    axes[0].set_ylim(0, 1.15 * published["value"].max())
    axes[0].set_title(f"published: Llama-3.2-3B, Uni-LoRA, d = {int(published['d'].iloc[0]):,}")
    axes[0].set_xlabel("rank r (n = 1 seed, no interval published)")
    axes[0].set_ylabel("GSM8K accuracy, %")
    ours(figure, axes[1], sweep, "r", "rank r")
    if sweep is not None:
        only_at(axes[1], sweep.cells["r"])
    return figure
