"""The score tables of the Uni-LoRA paper beside ours: GLUE, mathematics, instructions, images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.names import mapping
from paper_figures import style
from paper_figures.committed import NOT_AVAILABLE, NOT_RUN, Committed
from paper_figures.comparison import Comparison, Mean, Ours, Place, Row, rows, table
from paper_figures.panels import LINE, MISSING, heading, lines_of, point, say
from paper_figures.published import tables
from paper_figures.registry import Product, register

_TASKS = {label: task for task, label in mapping("tasks").items()}


def _by_task(table: str) -> dict[str, Place | Mean]:
    """The places of columns that are called as our tasks are, and of their average."""
    found = {column: _TASKS[column] for column in tables()[table]["units"] if column in _TASKS}
    return {**{column: Place(task) for column, task in found.items()}, "average": Mean(list(found.values()))}


_GLUE, _IMAGES = _by_task("glue_base"), _by_task("vision_base")
_SMALL = Ours("glue_budget", "MiniLM-L6 at one budget", _GLUE)
_GLUE_NOTES = [
    "In %: accuracy. The average is that of the six, each x 100.",
    "MiniLM-L6 (22.7 M numbers, 800 training rows, 3 epochs) stands in for RoBERTa, which needs a GPU. Its scores are "
    "not comparable with the published ones; the order of the methods at one budget is what it can show.",
]
_MATH = {"GSM8K": Place("metamath", "gsm8k"), "MATH": Place("metamath", "math500")}
_JUDGED = ["MT-Bench is scored by a judge outside this repository: `experiments.mt_bench` writes the answers."]

# of each published table that has any: our sweeps, and what a reader must know
_OURS: dict[str, tuple[Sequence[Ours], Sequence[str]]] = {
    "glue_base": ([Ours("glue_base", "RoBERTa-base", _GLUE), _SMALL], _GLUE_NOTES),
    "glue_large": ([Ours("glue_large", "RoBERTa-large", _GLUE), _SMALL], _GLUE_NOTES),
    "math": (
        [
            Ours("math", "Gemma-7B", _MATH, "google/gemma-7b"),
            Ours("gsm8k_budget", "SmolLM2-135M on 64 solutions", {"GSM8K": Place("gsm8k")}),
        ],
        ["Ours on MATH: the 500 problems of MATH-500. SmolLM2-135M stands in for Gemma-7B, which needs a GPU."],
    ),
    "instruction": ([], _JUDGED),
    "instruction_7b": ([], _JUDGED),
    "vision_base": ([Ours("vision", "ViT-B", _IMAGES, "google/vit-base-patch16-224-in21k")], []),
    "vision_large": ([Ours("vision", "ViT-L", _IMAGES, "google/vit-large-patch16-224-in21k")], []),
}
COMPARISONS = [
    Comparison(name, each["title"], each["base"], each["units"], *_OURS.get(name, ()))
    for name, each in tables().items()
    if "title" in each
]


def _maker(spec: Comparison) -> Callable[[Committed], Sequence[Product]]:
    def make(committed: Committed) -> Sequence[Product]:
        """A table and a figure of the rows that have a number."""
        found = rows(spec, committed)
        return table(spec, found), draw(spec, [row for row in found if row.known])

    return make


for each in COMPARISONS:
    register(each.name)(_maker(each))


def draw(spec: Comparison, rows: Sequence[Row]) -> Figure:
    """Each panel has an axis of its own: the blocks are different models."""
    blocks = {block: [row for row in rows if row.block == block] for block in dict.fromkeys(row.block for row in rows)}
    heights = [1.0 + LINE * len(own) for own in blocks.values()]
    figure = plt.figure(figsize=(style.PAGE, sum(heights)))
    grid = figure.add_gridspec(len(blocks), len(spec.units), height_ratios=heights)
    for number, (block, own) in enumerate(blocks.items()):
        line = [figure.add_subplot(grid[number, place]) for place in range(len(spec.units))]
        for (column, unit), panel in zip(spec.units.items(), line, strict=True):
            _panel(panel, own, column, panel is line[0], max(2, 16 // len(spec.units)))
            panel.set_xlabel(f"{column},\n{unit}", fontsize=6)
        heading(line[0], block + _count(own))
    return figure


def _count(rows: Sequence[Row]) -> str:
    """How many runs a point stands for, and what its bar is."""
    scores = [score for row in rows for score in row.scores.values()]
    counts = [score.n for score in scores if score.n]
    if not counts:
        return ": n not known to us"
    spread = "95 % interval" if rows[0].projection else "standard deviation"
    bars = f", mean and {spread}" if any(score.low is not None for score in scores) else ""
    return f": n = {style.span(counts)} seed{'s' if max(counts) > 1 else ''}{bars}"


def _labels(rows: Sequence[Row]) -> list[str]:
    """The methods; with their sizes, where a method has several."""
    methods = [row.method for row in rows]
    return [row.method if methods.count(row.method) == 1 else f"{row.method}, {row.trained}" for row in rows]


def _panel(axes: Axes, rows: Sequence[Row], column: str, first: bool, bins: int) -> None:
    if all(row.scores[column].value is None for row in rows):
        words = {row.scores[column].text for row in rows}
        say(axes, " / ".join(sorted(words)))
        return
    lines_of(axes, _labels(rows), first)
    for place, row in enumerate(rows):
        score = row.scores[column]
        if score.value is not None:
            point(axes, score.value, place, row.projection, score.low, score.high)
    axes.margins(x=0.1)
    axes.locator_params(axis="x", nbins=bins)
    if bins == 2:
        axes.tick_params(axis="x", labelsize=5.5)
    low, high = axes.get_xlim()
    for place, row in enumerate(rows):
        score = row.scores[column]
        if score.value is None:
            short = {NOT_AVAILABLE: "n. a.", NOT_RUN: NOT_RUN}.get(score.text, score.text)
            axes.text(low + 0.03 * (high - low), place, short, va="center", fontsize=5.5, color=MISSING)
        elif score.text.endswith("(?)"):
            axes.annotate(
                "?",
                (score.value, place),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=5.5,
                color=MISSING,
            )
