"""The picture: captured energy against d / D in three metrics, and the score that is left."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import style

METRICS = (("factor", "factors"), ("delta_W", "delta W"), ("fisher", "Fisher-weighted"), ("score", "score"))


def edge(energies: pd.Series) -> float:
    """The decade below the least energy above 0: where a logarithmic axis ends, with those at or below 0 on it.

    0.1 where none is above 0.
    """
    above = energies[energies > 0]
    return float(10.0 ** np.floor(np.log10(above.min()))) if len(above) else 0.1


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Four panels over d / D."""
    rows = tables["energy"].dropna(subset=["factor"]) if "factor" in tables["energy"] else pd.DataFrame()
    figure, axes = plt.subplots(2, 2, figsize=(style.PAGE, 5.2))
    if not len(rows):
        return figure
    for (key, title), place in zip(METRICS, axes.flat, strict=True):
        least = edge(rows[key])
        for name, mine in rows.sort_values("random").groupby("projection"):
            shown = mine[key] if key == "score" else mine[key].clip(lower=least)
            place.plot(mine["random"], shown, color=style.colour(name), marker=style.marker(name), label=name)
        place.set_xscale("log")
        place.set_title(title, loc="left")
        place.set_xlabel("d / D")
        place.set_ylabel("captured energy (0 or less: lower edge)" if key != "score" else "score (fraction)")
        if key == "score":
            for column, text in (("score_lora", "LoRA"), ("score_none", "no update")):
                place.axhline(rows[column].iloc[0], color="#555555", linestyle="--", linewidth=0.8)
                place.annotate(text, (0.3, rows[column].iloc[0]), fontsize=6, va="bottom")
        else:
            ends = [rows["random"].min(), 1.0]
            place.plot(ends, ends, color="#555555", linestyle="--", linewidth=0.8, label="d / D")
            place.set_yscale("log")
            place.set_ylim(least * 0.8, 1.3)
    facts = f"D = {int(rows['D'].iloc[0]):,}; score over n = {int(rows['score_rows'].iloc[0]):,} rows"
    axes[0, 0].annotate(facts, (0.02, 0.93), xycoords="axes fraction", fontsize=6)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), ncols=6, loc="outside lower center")
    return figure
