"""The picture: captured energy beside d / D in three metrics, and the score that is left; a line per projection."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.names import method
from paper_figures import style
from paper_figures.panels import FACTS, LINE, guide, lines_of

ENERGIES = {"factor": "factors", "delta_W": "delta W", "fisher": "Fisher-weighted"}
_SCORE = "test score (fraction)"
ENERGY = "captured energy (tick: d / D;\nhollow: 0 or less)"


def edge(energies: pd.Series) -> float:
    """The decade below the least energy above 0: where a logarithmic axis ends, with those at or below 0 on it.

    0.1 where none is above 0.
    """
    above = energies[energies > 0]
    return float(10.0 ** np.floor(np.log10(above.min()))) if len(above) else 0.1


def lines(axes: Axes, rows: pd.DataFrame, labelled: bool) -> dict[str, int]:
    """A horizontal line per projection, the first on top: one each, as many lie on one curve. Returns their places."""
    names = style.order(rows["projection"].unique())
    lines_of(axes, [method(name) for name in names], labelled)
    return {name: place for place, name in enumerate(names)}


def draw_energy(axes: Axes, rows: pd.DataFrame, key: str, labelled: bool) -> None:
    """Captured energy of every projection and d, beside d / D: what a random subspace captures."""
    places, least = lines(axes, rows, labelled), edge(rows[key])
    for row in rows.dropna(subset=[key]).to_dict("records"):
        place, colour, reached = places[row["projection"]], style.colour(row["projection"]), row[key] > 0
        axes.plot(row["random"], place, marker="|", color=FACTS, markersize=8, linestyle="none", zorder=1.5)
        axes.plot(
            max(row[key], least), place, marker=style.marker(row["projection"]), color=colour, linestyle="none",
            markerfacecolor=colour if reached else "white",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(min(least, rows["random"].min()) * 0.6, 1.8)
    axes.set_title(ENERGIES[key])


def _draw_score(axes: Axes, rows: pd.DataFrame, labelled: bool) -> None:
    places = lines(axes, rows, labelled)
    for row in rows.dropna(subset=["score"]).to_dict("records"):
        look = style.line(row["projection"]) | {"linestyle": "none"}
        axes.plot(row["score"], places[row["projection"]], **look)
    for column, text in (("score_lora", "LoRA"), ("score_none", "no update")):
        guide(axes, rows[column].iloc[0])
        axes.annotate(text, (rows[column].iloc[0], 0.02), xycoords=("data", "axes fraction"), fontsize=6, rotation=90)
    axes.set_title("score")


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Four panels, a line per projection and a point per d."""
    rows = tables["energy"].dropna(subset=["factor"]) if "factor" in tables["energy"] else pd.DataFrame()
    height = 1.1 + LINE * (rows["projection"].nunique() if len(rows) else 4)
    figure, axes = plt.subplots(2, 2, figsize=(style.PAGE, 2 * height))
    if not len(rows):
        return figure
    for number, (key, place) in enumerate(zip([*ENERGIES, "score"], axes.flat, strict=True)):
        if key == "score":
            _draw_score(place, rows, number % 2 == 0)
        else:
            draw_energy(place, rows, key, number % 2 == 0)
        place.set_xlabel(_SCORE if key == "score" else ENERGY)
    facts = f"D = {int(rows['D'].iloc[0]):,}, n = 1 adapter; score over {int(rows['score_rows'].iloc[0]):,} rows"
    figure.supxlabel(facts, fontsize=7)
    return figure
