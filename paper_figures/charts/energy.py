"""How much of a trained LoRA each projection can say, against d / D."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis import style
from analysis.reconstruction.figure import edge
from paper_figures.charts.parts import legend, missing, panels, say
from paper_figures.sources import NOT_RUN

METRICS = {"factor": "factors", "delta_W": "delta W", "fisher": "Fisher-weighted"}


def draw(energy: pd.DataFrame | None) -> Figure:
    """A panel per metric; dashed: d / D, what a random subspace captures."""
    if energy is None or energy["factor"].isna().all():
        return missing(f"captured energy: {NOT_RUN}")
    figure, axes = panels(len(METRICS), len(METRICS), 2.3)
    for (key, label), panel in zip(METRICS.items(), axes, strict=True):
        rows = energy.dropna(subset=[key])
        panel.set_title(label)
        if rows.empty:
            say(panel, NOT_RUN)
            continue
        least = edge(rows[key])
        for name, own in rows.sort_values("random").groupby("projection"):
            colour, marker = style.colour(name), style.marker(name)
            shown = own[key].clip(lower=least)
            panel.plot(own["random"], shown, markersize=3, linewidth=0.9, color=colour, marker=marker)
        ends = [rows["random"].min(), 1.0]
        panel.plot(ends, ends, color="#555555", linestyle="--", linewidth=0.8)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_ylim(least * 0.8, 1.4)
        panel.set_xlabel("d / D (dashed: a random subspace;\nn = 1 adapter, no interval)")
    axes[0].set_ylabel(f"captured energy, 0 or less: lower edge\n(fraction, D = {int(energy['D'].iloc[0]):,})")
    legend(figure, set(energy["projection"]))
    return figure
