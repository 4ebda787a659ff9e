"""The score against d: the published scan, and ours."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from paper_figures.committed import Committed, Sweep
from paper_figures.panels import PUBLISHED, panels
from paper_figures.published import of_table
from paper_figures.registry import Product, register
from paper_figures.sizes import logarithmic, ours, scan


@register("score_against_d")
def make(committed: Committed) -> Sequence[Product]:
    """From the sweep of this name."""
    published, sweep = of_table("score_against_d"), committed.sweep("score_against_d")
    return scan("Score against d", "trained", "trained numbers", published, sweep), draw(published, sweep)


def draw(published: pd.DataFrame, sweep: Sweep | None) -> Figure:
    """The published scan of d beside ours."""
    figure, axes = panels(2, 2, 2.3)
    axes[0].plot(published["d"], published["value"], color=PUBLISHED, marker="o", markerfacecolor="white")
    logarithmic(axes[0])
    axes[0].set_title("published: Llama-3.1-8B, Uni-LoRA")
    axes[0].set_xlabel("d (n = 1 seed, no interval published)")
    axes[0].set_ylabel("GSM8K accuracy, %")
    ours(figure, axes[1], sweep, "trained", "trained numbers")
    return figure
