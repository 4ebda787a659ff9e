"""Fastfood beside Uni-LoRA: score, time of a training step, memory."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import names
from experiments.names import method
from paper_figures import style
from paper_figures.cells import ratio, scaled, task_heads, with_numbers
from paper_figures.committed import NOT_RUN, Committed, Sweep
from paper_figures.comparison import OURS, Place, score_at
from paper_figures.panels import MISSING, guide, legend, panels, point, say
from paper_figures.published import notes
from paper_figures.registry import Product, register
from paper_figures.typesetting import Table

_FAMILY, _REFERENCE = "fastfood", "unilora"
# of the distance between two places: how far the methods at one of them are apart
_SPREAD = 0.6


@register("fastfood")
def make(committed: Committed) -> Sequence[Product]:
    """From the sweep at one budget and the costs of `analysis.overhead`."""
    sweep, costs = committed.sweep("glue_budget"), committed.costs
    found = {*(() if sweep is None else sweep.cells["projection"]), *(() if costs is None else costs["method"])}
    methods = [name for name in style.order(found) if name == _REFERENCE or name.startswith(_FAMILY)]
    return table(methods, sweep, costs), draw(methods, sweep, costs)


def table(methods: Sequence[str], sweep: Sweep | None, costs: pd.DataFrame | None) -> Table:
    """Score, time and memory; a method that was not measured on a base is named."""
    tasks = task_heads(sweep)
    bases = [] if costs is None else list(costs.groupby("base", sort=False))
    rows = []
    for name in methods:
        scores = [] if sweep is None else [score_at(sweep, Place(task), name).text for task in tasks]
        spent = []
        for _, part in bases:
            found = [[ratio(row, "step_ratio"), scaled(row.peak_bytes_per_coordinate_beyond_lora, 1)]
                     for row in part[part["method"] == name].itertuples()]  # fmt: skip
            spent += found[0] if found else [NOT_RUN, NOT_RUN]
        rows.append(["ours", method(name), *scores, *spent])
    known, unknown = with_numbers(rows)
    heads = ["block", "projection", *tasks.values()]
    for base in [names.model(base) for base, _ in bases]:
        heads += [f"step / LoRA, {base}", f"peak - LoRA's, {base}, B per coordinate"]
    below = [f"{what}: {NOT_RUN}." for what, own in (("Scores", sweep), ("Costs", costs)) if own is None]
    below += [*unknown, *notes("fastfood"), OURS]
    below += ["Step time: median of paired ratios to PEFT's LoRA, with its 95 % interval."]
    return Table("Fastfood beside Uni-LoRA: score, time, memory", heads, known, below)


def draw(methods: Sequence[str], sweep: Sweep | None, costs: pd.DataFrame | None) -> Figure:
    """Three panels: score per task, step time over LoRA's, peak memory beyond LoRA's per coordinate."""
    figure, axes = panels(3, 3, 2.2)
    _scores(axes[0], methods, sweep)
    if costs is None:
        say(axes[1], f"time: {NOT_RUN}")
        say(axes[2], f"memory: {NOT_RUN}")
    else:
        _cost(axes[1], methods, costs, "step_ratio", True)
        guide(axes[1], 1, upright=False)
        axes[1].set_ylabel("step time / LoRA's\n(median, 95 % interval)")
        axes[1].set_title(f"time, n = {int(costs['step_pairs'].min())} pairs")
        _cost(axes[2], methods, costs, "peak_bytes_per_coordinate_beyond_lora", False)
        guide(axes[2], 0, upright=False)
        axes[2].set_ylabel("peak memory - LoRA's,\nbytes per coordinate")
        axes[2].set_title("memory, n = 1 run")
    legend(figure, methods)
    return figure


def _aside(methods: Sequence[str]) -> dict[str, float]:
    """How far from its place each method is drawn."""
    return {name: _SPREAD * ((line + 0.5) / len(methods) - 0.5) for line, name in enumerate(methods)}


def _scores(axes: Axes, methods: Sequence[str], sweep: Sweep | None) -> None:
    if sweep is None:
        say(axes, f"score: {NOT_RUN}")
        return
    tasks = list(dict.fromkeys(sweep.cells["task"]))
    count = 1
    for place, task in enumerate(tasks):
        for name, aside in _aside(methods).items():
            found = score_at(sweep, Place(task), name)
            if found.value is not None:
                count = max(count, found.n or 1)
                point(axes, place + aside, found.value, name, found.low, found.high, upright=True)
            else:
                axes.annotate(
                    found.text, (place + aside, 0.02), xycoords=("data", "axes fraction"), rotation=90,
                    fontsize=5, color=MISSING, ha="center", va="bottom",
                )  # fmt: skip
    axes.set_xticks(range(len(tasks)), [names.task(task) for task in tasks])
    axes.set_xlim(-0.5, len(tasks) - 0.5)
    axes.set_ylabel("score x 100\n(mean, 95 % t interval)")
    axes.set_title(f"score, {names.model(sweep.cells['model'].iloc[0])}, n = {count} seeds")


def _cost(axes: Axes, methods: Sequence[str], costs: pd.DataFrame, key: str, interval: bool) -> None:
    bases = list(dict.fromkeys(costs["base"]))
    for place, base in enumerate(bases):
        for name, aside in _aside(methods).items():
            own = costs[(costs["base"] == base) & (costs["method"] == name)]
            if len(own) and pd.notna(own[key].iloc[0]):
                low, high = (own[f"{key}_{end}"].iloc[0] if interval else None for end in ("low", "high"))
                point(axes, place + aside, own[key].iloc[0], name, low, high, upright=True)
    axes.set_xticks(range(len(bases)), [names.model(base) for base in bases])
    axes.set_xlim(-0.5, len(bases) - 0.5)
