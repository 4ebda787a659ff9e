"""The picture: how far each method is from a memory copy, and where each method spends its bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from statistics import median

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from analysis.overhead.methods import CLONE
from analysis.overhead.summary import Row
from experiments import names
from paper_figures import style

# Okabe and Ito's palette: told apart by colour-blind readers; the markers tell them apart in grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_STACK = (("trained", "#0072B2"), ("state", "#E69F00"), ("rest of the peak", "#BBBBBB"))
ROW_HEIGHT, WIDTH = 0.27, 7.2
# In medians of all bars.
_LONGEST_BAR = 3.0


def draw(kernel: Sequence[Row], model: Sequence[Row]) -> bytes | None:
    """A PNG with a panel for each part that has something to show, or None if neither has."""
    timed = [row for row in kernel if row.get("both_per_copy") is not None]
    # every family has its own floors, which are one and the same
    timed = [row for row in timed if row["method"] != CLONE or row["family"] == timed[0]["family"]]
    sized = [row for row in model if "D" in row]
    # one base: bytes per coordinate of different models are different things
    sized = [row for row in sized if row["base"] == sized[-1]["base"]]
    panels = [(_draw_times, timed, len(_methods(timed))), (_draw_bytes, sized, len(sized))]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return None
    heights = [1.3 + ROW_HEIGHT * (1.8 if draw is _draw_times else 1.0) * rows for draw, _, rows in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(WIDTH, sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    for (draw_panel, rows, _), panel in zip(panels, axes[:, 0], strict=True):
        draw_panel(panel, rows)
    content = io.BytesIO()
    figure.savefig(content, dpi=200, format="png")
    plt.close(figure)
    return content.getvalue()


def _methods(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def _draw_times(axes: Axes, rows: Sequence[Row]) -> None:
    """Forward and adjoint together over the time to copy D floats, with 95 % intervals; one colour per case."""
    methods, cases = _methods(rows), list(dict.fromkeys(row["case"] for row in rows))
    for number, case in enumerate(cases):
        mine = [row for row in rows if row["case"] == case]
        middle = [row["both_per_copy"] for row in mine]
        bars = [
            [row["both_per_copy"] - row["both_per_copy_low"] for row in mine],
            [row["both_per_copy_high"] - row["both_per_copy"] for row in mine],
        ]
        shift = 0.7 * ((number + 0.5) / len(cases) - 0.5)
        axes.errorbar(
            middle, [methods.index(row["method"]) + shift for row in mine], xerr=bars,
            fmt=MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)], markersize=4, capsize=2, linewidth=1,
            label=f"{case}, D = {mine[0]['D']:.1e}".replace("e+0", "e"),
        )  # fmt: skip
    axes.axvline(1.0, color="#555555", linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(methods)), [names.method(method) for method in methods])
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.grid(axis="x", which="both", alpha=0.25)
    rounds = style.span(row["rounds"] for row in rows)
    axes.set_xlabel(
        "time of forward + adjoint / time to copy D floats\n"
        f"(median of n = {rounds} paired ratios, 95 % interval; dashed: the copy)",
        fontsize=8,
    )
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=7, frameon=False)


def _draw_bytes(axes: Axes, rows: Sequence[Row]) -> None:
    """Trained numbers, state, and the rest of the peak of a training step, stacked, per coordinate of theta_D."""
    parts = [
        [row["trained_bytes"] / row["D"] for row in rows],
        [row["state_bytes"] / row["D"] for row in rows],
        [(row["peak_bytes"] - row["trained_bytes"] - row["state_bytes"]) / row["D"] for row in rows],
    ]
    left = [0.0] * len(rows)
    for (label, colour), values in zip(_STACK, parts, strict=True):
        # the state is counted after a forward pass without gradients, and may exceed the peak of a step by a little
        shown = [max(0.0, value) for value in values]
        axes.barh(range(len(rows)), shown, left=left, color=colour, label=label, height=0.75)
        left = [start + value for start, value in zip(left, shown, strict=True)]
    # a dense P would make all other bars invisible: its bar is cut and its value written
    limit = min(1.05 * max(left), _LONGEST_BAR * median(left))
    for place, value in enumerate(left):
        if value > limit:
            axes.text(0.99 * limit, place, f"to {value:,.0f}", ha="right", va="center", fontsize=7)
    axes.set_xlim(0, limit)
    axes.set_yticks(range(len(rows)), [names.method(row["method"]) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(
        f"bytes per coordinate of theta_D at the peak of a training step\n({rows[0]['base']}, D = {rows[0]['D']:,}; "
        "rest: activations, gradients, AdamW)",
        fontsize=8,
    )
    axes.grid(axis="x", alpha=0.25)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=7, frameon=False)
