"""The look of every chart: a fixed colour and marker per projection, and files that are the same byte for byte."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

import uniproj
from experiments.results import write_bytes

# Okabe and Ito's palette without yellow, which is faint on paper: told apart by colour-blind readers.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# As many as share no divisor with the colours, so that no two of 70 projections look alike, in grey print neither.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
UNKNOWN = "#888888"
# Inches: one column of a two-column page, and the whole page.
COLUMN, PAGE = 3.35, 6.9
BUILT_IN = "uniproj.projections."
_RC = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 7,
    "axes.labelsize": 7,
    "axes.titlesize": 8,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "figure.constrained_layout.use": True,
    # every figure of a call is made before the first is written
    "figure.max_open_warning": 0,
    "savefig.dpi": 300,
    # TrueType: text stays text in a PDF
    "pdf.fonttype": 42,
}


def order(names: list[str]) -> list[str]:
    """The library's own projections first: another package's never changes the colour of one of these."""
    return sorted(names, key=lambda name: (not uniproj.get(name).__module__.startswith(BUILT_IN), name))


@cache
def _positions(names: tuple[str, ...]) -> dict[str, int]:
    return {name: position for position, name in enumerate(order(list(names)))}


def _position(name: str) -> int | None:
    return _positions(tuple(uniproj.names())).get(name)


def colour(name: str) -> str:
    """Hex colour of a projection by its place in the registry; grey for a name that is not in it."""
    position = _position(name)
    return UNKNOWN if position is None else PALETTE[position % len(PALETTE)]


def marker(name: str) -> str:
    """Marker of a projection, which together with its colour is its own."""
    return MARKERS[(_position(name) or 0) % len(MARKERS)]


def span(sizes: pd.Series) -> str:
    """The least and the largest of these counts, as a title has them."""
    low, high = int(sizes.min()), int(sizes.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


@contextmanager
def use() -> Iterator[None]:
    """Draw in the common style: sans-serif, 6 to 8 points, to be printed at the width of one column (`COLUMN`)."""
    with matplotlib.rc_context(_RC):
        yield


def save(figure: Figure, path: Path) -> None:
    """Write path.png and path.pdf and close the figure; neither file holds a date. `path` has no suffix.

    Raises ExperimentError where the files cannot be written.
    """
    undated = {"png": {"Software": None}, "pdf": {"CreationDate": None}}
    # the type of a PDF's fonts is read when the file is written
    with use():
        for kind, metadata in undated.items():
            content = io.BytesIO()
            figure.savefig(content, format=kind, metadata=metadata)
            write_bytes(path.with_name(f"{path.name}.{kind}"), content.getvalue())
    plt.close(figure)
