"""The score tables of the Uni-LoRA paper beside ours: GLUE, mathematics, instructions, images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from textwrap import fill

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.names import method
from paper_figures import style
from paper_figures.committed import NOT_AVAILABLE, NOT_RUN, Committed
from paper_figures.comparison import Comparison, Mean, Ours, Place, Row, rows, table
from paper_figures.panels import LINE, MISSING, heading, lines_of, point, say
from paper_figures.published import claims
from paper_figures.registry import Product, register

_EMPTY = 0.4
# characters of a line
_WRAP = 120
METHODS = {name: method(name) for name in ("lora", "unilora", "fastfood", "vera", "tied_lora", "vblora", "lora_xs")}
GLUE = {"SST-2": "sst2", "MRPC": "mrpc", "CoLA": "cola", "QNLI": "qnli", "RTE": "rte", "STS-B": "stsb"}
_GLUE_COLUMNS = [*GLUE, "average"]
# of the others it is the accuracy, in %
_GLUE_UNITS = {"CoLA": "Matthews x 100", "STS-B": "Pearson x 100", "average": "x 100"}
_GLUE_PLACES: dict[str, Place | Mean] = {
    **{column: Place(f"glue/{task}") for column, task in GLUE.items()},
    "average": Mean([f"glue/{task}" for task in GLUE.values()]),
}
_SMALL_GLUE = Ours("glue_budget", "MiniLM-L6 at one budget", _GLUE_PLACES)
_SMALL_NOTE = (
    "MiniLM-L6 (22.7 M numbers, 800 training rows, 3 epochs) stands in for RoBERTa, which needs a GPU. Its scores are "
    "not comparable with the published ones; the order of the methods at one budget is what it can show."
)
CIFAR = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100"}
_VIT = {"ViT-B": "google/vit-base-patch16-224-in21k", "ViT-L": "google/vit-large-patch16-224-in21k"}
_VISION = {f"{c}, {v}": Place(task, model=model) for v, model in _VIT.items() for c, task in CIFAR.items()}

MATH = {
    "GSM8K": Place("metamath", "gsm8k", "google/gemma-7b"),
    "MATH": Place("metamath", "math500", "google/gemma-7b"),
}


def _glue(size: str) -> Comparison:
    return Comparison(
        f"glue_{size}", f"GLUE, RoBERTa-{size}", f"RoBERTa-{size}", _GLUE_COLUMNS, "%", METHODS,
        [Ours(f"glue_{size}", f"RoBERTa-{size}", _GLUE_PLACES), _SMALL_GLUE],
        ["In %: accuracy. The average is that of the six, each x 100.", _SMALL_NOTE], _GLUE_UNITS,
    )  # fmt: skip


COMPARISONS = [
    _glue("base"),
    _glue("large"),
    Comparison(
        "math", "Mathematical reasoning, Gemma-7B on MetaMathQA", "Gemma-7B", ["GSM8K", "MATH"], "%", METHODS,
        [
            Ours("math", "Gemma-7B", MATH),
            Ours("gsm8k_budget", "SmolLM2-135M on 64 solutions", {"GSM8K": Place("gsm8k")}),
        ],
        ["Ours on MATH: the 500 problems of MATH-500. SmolLM2-135M stands in for Gemma-7B, which needs a GPU."],
    ),
    Comparison(
        "instruction", "Instruction tuning, Llama-2-13B on Cleaned Alpaca", "Llama-2-13B", ["turn 1", "turn 2"],
        "MT-Bench", METHODS, [Ours("mt_bench", "Llama-2-13B", {})],
        ["MT-Bench is scored by a judge outside this repository: `experiments.mt_bench` writes the answers."],
    ),
    Comparison(
        "vision", "Image classification, ViT-B and ViT-L", "ViT", list(_VISION), "%", METHODS,
        [Ours("vision", "ViT", _VISION)],
    ),
]  # fmt: skip


def _maker(spec: Comparison) -> Callable[[Committed], Sequence[Product]]:
    def make(committed: Committed) -> Sequence[Product]:
        """A table, and a figure where there is a number to draw."""
        found = rows(spec, committed)
        return [table(spec, found), draw(spec, found)] if drawn(found) else [table(spec, found)]

    return make


for each in COMPARISONS:
    register(each.name)(_maker(each))


def draw(spec: Comparison, rows: Sequence[Row]) -> Figure:
    """Each panel has an axis of its own: the blocks are different models."""
    blocks = {block: [row for row in rows if row.block == block] for block in dict.fromkeys(row.block for row in rows)}
    heights = [1.0 + LINE * len(own) if drawn(own) else _EMPTY for own in blocks.values()]
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
    text = fill(f"{block}: {' / '.join(words)}{''.join(said)}", _WRAP)
    axes.set_axis_off()
    axes.text(0, 0.5, text, va="center", color=MISSING, fontsize=7).set_in_layout(False)


def _count(rows: Sequence[Row]) -> str:
    """How many runs a point stands for."""
    counts = [score.n for row in rows for score in row.scores.values() if score.n]
    return f": n = {style.span(counts)} seeds, mean and 95 % interval" if counts else ": n not known to us"


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
            axes.text(low + 0.03 * (high - low), place, short, va="center", fontsize=5.5, color=MISSING)
