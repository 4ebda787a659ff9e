"""The look of every chart: a fixed colour and marker per entrant, and files that are the same byte for byte."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

import uniproj
from experiments.files import write_bytes
from experiments.names import mapping, method
from experiments.runs import entrants

# Okabe and Ito's colours, which colour-blind readers tell apart, without yellow, which is faint on paper; then Tol's
# muted ones and others that are none of these.
_PALETTE = (
    *("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#882255", "#332288", "#CC6677", "#661100", "#999933", "#AA4499", "#7D8597", "#117733", "#8B5CF6", "#A6761D"),
    *("#1B9E9E", "#C2185B", "#4D7C0F", "#6699CC"),
)
# Ten, which has no divisor in common with the 21 colours: 210 entrants differ in colour or marker.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
# the next one after every seven projections
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.2)), (0, (1.2, 1)), (0, (5, 1, 1, 1)))
UNKNOWN = "#888888"
# Inches: one column of a two-column page, and the whole page.
COLUMN, PAGE = 3.35, 6.9
_BUILT_IN = "uniproj.projections."
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


def order(names: Iterable[str]) -> list[str]:
    """As names.yaml lists them, then the library's other projections, then what PEFT and other packages have."""
    known = list(mapping("methods"))

    def place(name: str) -> tuple[int, bool, str]:
        listed = known.index(name) if name in known else len(known)
        own = name in uniproj.names() and uniproj.get(name).__module__.startswith(_BUILT_IN)
        return listed, not own, name

    return sorted(names, key=place)


@cache
def _positions(names: tuple[str, ...]) -> dict[str, int]:
    return {name: position for position, name in enumerate(order(names))}


def _position(name: str) -> int | None:
    return _positions(tuple(entrants.names())).get(name)


def look(position: int) -> tuple[str, str, Any]:
    """Colour, marker and dash of the entrant at this place; no two have the same colour and marker."""
    return _PALETTE[position % len(_PALETTE)], MARKERS[position % len(MARKERS)], _DASHES[position // 7 % len(_DASHES)]


def colour(name: str) -> str:
    """Hex colour of an entrant by its place in `order`; grey for a name that is not in it."""
    position = _position(name)
    return UNKNOWN if position is None else look(position)[0]


def marker(name: str) -> str:
    """Marker of an entrant."""
    return look(_position(name) or 0)[1]


def dash(name: str) -> Any:
    """Line style of an entrant."""
    return look(_position(name) or 0)[2]


def line(name: str) -> dict[str, Any]:
    """Colour, marker and dash of an entrant's line, and its name in the legend: arguments of `Axes.plot`."""
    return {"color": colour(name), "marker": marker(name), "linestyle": dash(name), "label": method(name)}


def span(counts: Iterable[float]) -> str:
    """The least and the largest of these counts, as titles and axes have them: 3, or 1 to 3."""
    found = sorted(map(int, counts))
    return f"{found[0]:,}" if found[0] == found[-1] else f"{found[0]:,} to {found[-1]:,}"


@contextmanager
def use() -> Iterator[None]:
    """Draw in the common style: sans-serif, 6 to 8 points, to be printed at the width of one column (`COLUMN`)."""
    with matplotlib.rc_context(_RC):
        yield


def picture(draw: Callable[[Mapping[str, pd.DataFrame]], Figure]) -> Callable[[Mapping[str, pd.DataFrame], Path], None]:
    """The last step of a command of `analysis`: draw its tables in the common style and write both files."""

    def write(tables: Mapping[str, pd.DataFrame], path: Path) -> None:
        with use():
            save(draw(tables), path)

    return write


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
