"""Time and memory: training steps beside LoRA's, and kernels beside a memory copy."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from analysis import style
from experiments.names import method
from experiments.names import model as model_name
from paper_figures.charts.parts import LINE, lines_of, missing, panels, point, say
from paper_figures.sources import NOT_RUN

UNIT_LINE = "#555555"
FLOOR = ("copy", "clone")


def training(published: pd.DataFrame, model: pd.DataFrame | None) -> Figure:
    """Step time over LoRA's: PEFT's benchmark, and ours on each base."""
    ours = [] if model is None else [(base, own) for base, own in model.groupby("base", sort=False)]
    values = published[(published["table"] == "training_cost") & (published["column"] == "step time / LoRA")]
    most = max([len(values), *(len(own) for _, own in ours)])
    count = 1 + max(1, len(ours))
    figure, axes = panels(count, count, 0.8 + LINE * most)
    lines_of(axes[0], list(values["method"]))
    for place, value in enumerate(values["value"]):
        point(axes[0], value, place, None)
    axes[0].axvline(1, color=UNIT_LINE, linewidth=0.8, linestyle="--")
    axes[0].set_title("published: PEFT,\nLlama-3.2-3B, GPU")
    axes[0].set_xlabel("step time / LoRA's\n(n = 1 run)")
    if not ours:
        say(axes[1], f"ours: {NOT_RUN}")
    for (base, own), panel in zip(ours, axes[1:], strict=False):
        _ratios(panel, own, f"ours: {model_name(base)},\nCPU")
    return figure


def _ratios(axes: Axes, rows: pd.DataFrame, title: str) -> None:
    rows = rows.sort_values("step_ratio", na_position="last")
    lines_of(axes, [method(name) for name in rows["method"]])
    for place, row in enumerate(rows.itertuples()):
        if pd.isna(row.step_ratio):
            axes.text(1, place, "not measured", fontsize=5.5, color="#777777", va="center")
        else:
            point(axes, row.step_ratio, place, row.method, row.step_ratio_low, row.step_ratio_high)
    axes.axvline(1, color=UNIT_LINE, linewidth=0.8, linestyle="--")
    if rows["step_ratio"].max() > 2:
        axes.set_xscale("log")
        axes.set_xticks([1, 1.5, 2, 3], ["1", "1.5", "2", "3"])
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title(title)
    axes.set_xlabel(f"step time / LoRA's\n(n = {int(rows['step_pairs'].min())} pairs, median,\n95 % interval)")


def floor(kernel: pd.DataFrame | None) -> Figure:
    """Forward and adjoint over the time to copy D floats, a panel per architecture."""
    if kernel is None:
        return missing(f"ratio to the bandwidth floor: {NOT_RUN}")
    timed = kernel[kernel["both_per_copy"].notna()]
    timed = timed[(timed["method"] != FLOOR[1]) | (timed["family"] == timed["family"].iloc[0])]
    cases = list(dict.fromkeys(timed["case"]))
    methods = list(dict.fromkeys(timed["method"]))
    figure, axes = plt.subplots(
        1, len(cases), figsize=(style.PAGE, 0.9 + LINE * len(methods)), squeeze=False, sharex=True, sharey=True
    )
    for place, (case, panel) in enumerate(zip(cases, axes[0], strict=True)):
        lines_of(panel, [method(name) for name in methods])
        own = timed[timed["case"] == case]
        for row in own.itertuples():
            point(
                panel,
                row.both_per_copy,
                methods.index(row.method),
                row.method,
                row.both_per_copy_low,
                row.both_per_copy_high,
            )
        panel.axvline(1, color=UNIT_LINE, linewidth=0.8, linestyle="--")
        panel.set_xscale("log")
        panel.set_title(f"{case}\nD = {own['D'].iloc[0]:,}", fontsize=6)
        panel.set_xlabel(f"ratio to a copy\n(median of n = {int(own['rounds'].min())},\n95 % interval)")
        panel.tick_params(labelleft=place == 0)
    return figure
