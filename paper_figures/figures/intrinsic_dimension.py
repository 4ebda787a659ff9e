"""How few trained numbers do as well as LoRA: the score against them, and d90 of each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from analysis import intrinsic_dimension
from analysis.intrinsic_dimension.measure import GROUP
from experiments import names
from experiments.names import method
from experiments.records.statistics import unit
from paper_figures import style
from paper_figures.cells import whole
from paper_figures.committed import NOT_RUN, Committed
from paper_figures.panels import FACTS, missing
from paper_figures.registry import Product, register
from paper_figures.typesetting import Table

_TITLE = "Intrinsic dimension of each method"


@register("intrinsic_dimension")
def make(committed: Committed) -> Sequence[Product]:
    """From the runs of the sweep over d."""
    sweep = committed.sweep("score_against_d")
    if sweep is None:
        return table(None), missing(f"intrinsic dimension: {NOT_RUN}")
    found = intrinsic_dimension.summary(sweep.finished)
    return table(found["d90"]), draw(found)


def table(d90: pd.DataFrame | None) -> Table:
    """d90 of each method."""
    rows = [] if d90 is None else [
        [f"{names.task(row.task)}, {names.model(row.model)}", method(row.projection), _end(row.d90),
         "not reached" if pd.isna(row.low) else f"{_end(row.low)} to {_end(row.high)}",
         f"{100 * row.reached:.0f}", str(row.sizes), str(row.seeds),
         "yes" if row.smallest else "no"]
        for row in d90.itertuples()
    ]  # fmt: skip
    heads = ["task and model", "method", "d90", "95 % interval", "draws that reach it, %", "sizes", "seeds",
             "already its smallest size"]  # fmt: skip
    notes = ["d90: trained numbers that reach 90 % of LoRA's gain over the most frequent label; bootstrap over seeds. "
             "Where already the smallest size reaches it, d90 is an upper bound. The paper states none."]  # fmt: skip
    return Table(_TITLE, heads, rows, notes if rows else [f"Ours: {NOT_RUN}.", *notes])


def _end(value: float) -> str:
    return "not reached" if pd.isna(value) else whole(value)


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Score against trained numbers, one panel per task and model, with the threshold."""
    points, found = tables["curves"], tables["d90"]
    wheres = list(found.groupby(GROUP).groups)
    figure, axes = plt.subplots(len(wheres), 1, figsize=(style.COLUMN, 2.9 * len(wheres)), squeeze=False)
    for where, place in zip(wheres, axes[:, 0], strict=True):
        mine = points[(points[GROUP] == list(where)).all(axis=1)]
        facts = found[(found[GROUP] == list(where)).all(axis=1)]
        for name in style.order(mine["projection"].unique()):
            curve = mine[mine["projection"] == name]
            middle, low, high = (100 * curve[key] for key in ("score", "score_low", "score_high"))
            ends = [(middle - low).fillna(0.0), (high - middle).fillna(0.0)]
            place.errorbar(curve["trained"], middle, yerr=ends, capsize=2, elinewidth=0.8, **style.line(name))
        for key, dash, label in (("threshold", "--", "90 % of gain"), ("baseline", ":", "majority")):
            place.axhline(100 * facts[key].iloc[0], color=FACTS, linestyle=dash, linewidth=0.8, label=label)
        place.set_xscale("log")
        place.set_xlabel("trained numbers without the head")
        place.set_ylabel(f"test {unit(mine['metric'].iloc[0])}\n(mean, 95 % t interval)")
        runs = style.span(mine["n"])
        place.set_title(f"{names.task(where[0])}, {names.model(where[1])}; n = {runs} runs", loc="left")
        place.legend(ncols=2, loc="lower right")
    return figure
