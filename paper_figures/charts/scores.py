"""Published scores and ours, a row of panels per block and a panel per column."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import style
from paper_figures.charts.parts import LINE, MISSING, heading, lines_of, point, say
from paper_figures.comparison import Comparison, Row
from paper_figures.published import claims
from paper_figures.sources import NOT_AVAILABLE, NOT_RUN

EMPTY = 0.4
# characters of a line
WRAP = 120


def draw(spec: Comparison, rows: Sequence[Row]) -> Figure:
    """Each panel has an axis of its own: the blocks are different models."""
    blocks = {block: [row for row in rows if row.block == block] for block in dict.fromkeys(row.block for row in rows)}
    heights = [1.0 + LINE * len(own) if drawn(own) else EMPTY for own in blocks.values()]
    figure = plt.figure(figsize=(style.PAGE, sum(heights)))
    grid = figure.add_gridspec(len(blocks), len(spec.columns), height_ratios=heights)
    for number, (block, own) in enumerate(blocks.items()):
        if not drawn(own):
            _line(figure.add_subplot(grid[number, :]), spec, block, own)
            continue
        line = [figure.add_subplot(grid[number, place]) for place in range(len(spec.columns))]
        for column, panel in zip(spec.columns, line, strict=True):
            _panel(panel, own, column, panel is line[0], len(spec.columns) > 4)
            panel.set_xlabel(f"{column},\n{spec.unit_of(column)}", fontsize=6)
        heading(line[0], block + _count(own))
    return figure


def _line(axes: Axes, spec: Comparison, block: str, rows: Sequence[Row]) -> None:
    """A block without a number: why, and what is reported of it in words."""
    words = sorted({score.text for row in rows for score in row.scores.values()})
    said = [f"; reported without numbers: {claim}" for claim in claims(spec.name)] if words == [NOT_AVAILABLE] else []
    text = fill(f"{block}: {' / '.join(words)}{''.join(said)}", WRAP)
    axes.set_axis_off()
    axes.text(0, 0.5, text, va="center", color=MISSING, fontsize=7).set_in_layout(False)


def _count(rows: Sequence[Row]) -> str:
    """How many runs a point stands for."""
    counts = sorted({score.n for row in rows for score in row.scores.values() if score.n})
    if not counts:
        return ": n not known to us"
    return f": n = {counts[0] if len(counts) == 1 else f'{counts[0]} to {counts[-1]}'} seeds, mean and 95 % interval"


def drawn(rows: Sequence[Row]) -> bool:
    """Whether there is a number among them."""
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
