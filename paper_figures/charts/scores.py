"""Published scores and ours, a row of panels per block and a panel per column."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import style
from paper_figures.charts.parts import LINE, heading, lines_of, point, say
from paper_figures.comparison import Comparison, Row
from paper_figures.sources import NOT_AVAILABLE, NOT_RUN

EMPTY = 0.55


def draw(spec: Comparison, rows: Sequence[Row]) -> Figure:
    """Each panel has an axis of its own: the blocks are different models."""
    blocks = list(dict.fromkeys(row.block for row in rows))
    members = [[row for row in rows if row.block == block] for block in blocks]
    heights = [0.75 + LINE * len(own) if _drawn(own) else EMPTY for own in members]
    figure, axes = plt.subplots(
        len(blocks), len(spec.columns), figsize=(style.PAGE, sum(heights)), height_ratios=heights, squeeze=False
    )
    for block, own, line in zip(blocks, members, axes, strict=True):
        for place, (column, panel) in enumerate(zip(spec.columns, line, strict=True)):
            _panel(panel, own, column, place == 0, len(spec.columns) > 4)
        heading(line[0], block + _count(own))
    for column, panel in zip(spec.columns, axes[-1], strict=True):
        panel.set_xlabel(f"{column}, {spec.unit}")
    for line in axes[:-1]:
        for column, panel in zip(spec.columns, line, strict=True):
            panel.set_xlabel(f"{column}, {spec.unit}" if panel.lines or panel.collections else column)
    return figure


def _count(rows: Sequence[Row]) -> str:
    """How many runs a point stands for."""
    if not _drawn(rows):
        return ""
    counts = sorted({score.n for row in rows for score in row.scores.values() if score.n})
    if not counts:
        return ": n not known to us"
    return f": n = {counts[0] if len(counts) == 1 else f'{counts[0]} to {counts[-1]}'} seeds, mean and 95 % interval"


def _drawn(rows: Sequence[Row]) -> bool:
    return any(score.value is not None for row in rows for score in row.scores.values())


def _panel(axes: Axes, rows: Sequence[Row], column: str, first: bool, narrow: bool) -> None:
    if all(row.scores[column].value is None for row in rows):
        words = {row.scores[column].text for row in rows}
        say(axes, " / ".join(sorted(words)))
        return
    lines_of(axes, [row.method for row in rows], first)
    published = rows[0].block.startswith("published")
    for place, row in enumerate(rows):
        score = row.scores[column]
        if score.value is None:
            continue
        point(axes, score.value, place, None if published else row.projection, score.low, score.high)
    axes.locator_params(axis="x", nbins=2 if narrow else 8)
    low, high = axes.get_xlim()
    for place, row in enumerate(rows):
        if row.scores[column].value is None:
            text = row.scores[column].text
            short = {NOT_AVAILABLE: "n. a.", NOT_RUN: NOT_RUN}.get(text, text)
            axes.text(low + 0.03 * (high - low), place, short, va="center", fontsize=5.5, color="#777777")
