"""A heat map of layers against coordinates of theta_d for every projection."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from experiments.names import method
from paper_figures import style


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """A heat map for the default of every projection, with its loads in the title."""
    maps, rows = tables["map"], tables["columns"].set_index("variant")
    names = list(dict.fromkeys(maps["projection"])) if len(maps) else []
    wide = 4
    tall = max(1, -(-len(names) // wide))
    figure, axes = plt.subplots(tall, wide, figsize=(style.PAGE, 1.25 * tall + 0.5), squeeze=False)
    for place in axes.flat[len(names) :]:
        place.axis("off")
    for name, place in zip(names, axes.flat, strict=False):
        mine = maps[maps["projection"] == name]
        mine = mine[mine["variant"] == mine["variant"].iloc[0]]
        table = mine.pivot(index="layer", columns="coordinate", values="share").reindex(mine["layer"].unique())
        image = place.imshow(table.to_numpy(), aspect="auto", vmin=0, vmax=1, cmap="cividis", interpolation="nearest")
        place.grid(False)
        facts = rows.loc[mine["variant"].iloc[0]]
        place.set_title(
            f"{method(name)}\nd = {int(facts['d']):,}, max/mean load {facts['n_max_per_mean']:.2f}", fontsize=5.5
        )
        place.set_xticks([0, len(table.columns) - 1], ["0", "d"])
        place.set_yticks([0, len(table) - 1], ["first", "last"])
    if names:
        D = int(tables["columns"]["D"].max())
        figure.supxlabel(f"coordinates of theta_d, in order; D = {D:,}, n = 1 seed", fontsize=7)
        figure.supylabel("layers, B and A", fontsize=7)
        figure.colorbar(image, ax=axes, shrink=0.5, label="share of a coordinate's squared entries")
    return figure
