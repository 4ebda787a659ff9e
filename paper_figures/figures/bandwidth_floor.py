"""Forward and adjoint of every method beside a memory copy."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from experiments.names import method
from paper_figures import style
from paper_figures.committed import NOT_RUN, Committed
from paper_figures.panels import LINE, guide, lines_of, missing, point
from paper_figures.registry import register

# the second of the two floors, which every family of methods was measured beside
CLONE = "clone"


@register("bandwidth_floor")
def make(committed: Committed) -> Sequence[Figure]:
    """Forward and adjoint over the time to copy D floats, a panel per architecture."""
    kernel = committed.read("overhead/overhead-kernel.csv", "case", "method", "both_per_copy", "rounds")
    if kernel is None:
        return [missing(f"ratio to the bandwidth floor: {NOT_RUN}")]
    timed = kernel[kernel["both_per_copy"].notna()]
    timed = timed[(timed["method"] != CLONE) | (timed["family"] == timed["family"].iloc[0])]
    cases = list(dict.fromkeys(timed["case"]))
    methods = list(dict.fromkeys(timed["method"]))
    figure, axes = plt.subplots(
        1, len(cases), figsize=(style.PAGE, 0.9 + LINE * len(methods)), squeeze=False, sharex=True, sharey=True
    )
    for place, (case, panel) in enumerate(zip(cases, axes[0], strict=True)):
        lines_of(panel, [method(name) for name in methods])
        own = timed[timed["case"] == case]
        for row in own.itertuples():
            low, high = row.both_per_copy_low, row.both_per_copy_high
            point(panel, row.both_per_copy, methods.index(row.method), row.method, low, high)
        guide(panel, 1)
        panel.set_xscale("log")
        panel.set_title(f"{case}\nD = {own['D'].iloc[0]:,}", fontsize=6)
        panel.set_xlabel(f"ratio to a copy\n(median of n = {int(own['rounds'].min())},\n95 % interval)")
        panel.tick_params(labelleft=place == 0)
    return [figure]
