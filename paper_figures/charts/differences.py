"""The ablations: score of each partition minus Uni-LoRA's, paired by seed."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from experiments import names
from experiments.names import method
from paper_figures.charts.parts import LINE, lines_of, missing, panels, point
from paper_figures.sources import NOT_RUN, Sweep

REFERENCE = "unilora"
ABLATIONS = ("unilora_local", "unilora_nonuniform", "unilora_unnormalised")


def draw(sweep: Sweep | None, differences: pd.DataFrame) -> Figure:
    """One panel per task; a vertical line at no difference."""
    if sweep is None or differences.empty:
        return missing(f"ablations: {NOT_RUN}")
    tasks = list(dict.fromkeys(differences["task"]))
    figure, axes = panels(len(tasks), 4, 0.8 + LINE * 2 * len(ABLATIONS))
    for place, (task, panel) in enumerate(zip(tasks, axes, strict=True)):
        lines_of(panel, [method(name) for name in ABLATIONS], place % 4 == 0)
        panel.axvline(0, color="#555555", linewidth=0.8, linestyle="--")
        own = differences[differences["task"] == task].set_index("projection")
        for line, name in enumerate(ABLATIONS):
            if name in own.index:
                found = own.loc[name]
                point(panel, 100 * found["difference"], line, name, 100 * found["t_low"], 100 * found["t_high"])
            else:
                left = panel.get_yaxis_transform()
                panel.text(0.05, line, NOT_RUN, va="bottom", fontsize=5.5, color="#777777", transform=left)
        pairs = int(own["pairs"].max())
        panel.set_title(f"{names.task(task)}, n = {pairs} pairs")
        panel.set_xlabel(f"score - {method(REFERENCE)}'s,\nx 100 (95 % t interval)")
    return figure
