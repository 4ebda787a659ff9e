"""Which parts of a model each coordinate of theta_d touches: loads, globality, and a heat map."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.columns import Loads, loads
from analysis.command import bar
from analysis.spaces import Choice, entries
from uniproj import LoRALayout

# Columns of the heat map: coordinates of theta_d in groups of equal size.
GROUPS = 64


def layer_of(module: str) -> str:
    """A module's name up to its last number: `layer.3.query` is part of `layer.3`; without a number, the whole name."""
    found = re.match(r"(?:.*\.)?\d+(?=\.|$)", module)
    return found.group() if found else module


def touched(found: Loads, keys: Sequence[str]) -> np.ndarray:
    """(d,) int64: how many different keys the blocks have in which a column is not zero; a key per block."""
    return (_by_key(found, keys) > 0).sum(axis=0)


def _by_key(found: Loads, keys: Sequence[str]) -> np.ndarray:
    """(keys, d): the squared entries of every column, summed over the blocks of each key in order of appearance."""
    distinct = list(dict.fromkeys(keys))
    summed = np.zeros((len(distinct), found.energy.shape[1]))
    for row, key in enumerate(keys):
        summed[distinct.index(key)] += found.energy[[row]].toarray().ravel()
    return summed


def describe(found: Loads, space: LoRALayout) -> dict[str, Any]:
    """Globality and uniformity of one P.

    Fractions of the d columns that touch more than one module, more than one layer, both an A and a B; mean modules
    per column and its quotient by the count of modules (`globality`). n_j = non-zeros of column j: mean, sd / mean,
    max / mean, empty columns, and `entropy`: that of n_j / sum n over its maximum log d, 1 where all are equal.
    Non-zeros per row: least, mean, largest, and rows without any.
    """
    modules = touched(found, [block.module for block in space.blocks])
    layers = touched(found, [layer_of(block.module) for block in space.blocks])
    factors = touched(found, [block.factor for block in space.blocks])
    n, rows = found.per_column.astype(float), found.per_row
    share = n[n > 0] / max(n.sum(), 1.0)
    return {
        "several_modules": float((modules > 1).mean()),
        "several_layers": float((layers > 1).mean()),
        "A_and_B": float((factors > 1).mean()),
        "modules_per_column": float(modules.mean()),
        "globality": float(modules.mean() / len(space.modules)),
        "n_min": int(n.min()),
        "n_mean": float(n.mean()),
        "n_max": int(n.max()),
        "n_cv": float(n.std() / n.mean()),
        "n_max_per_mean": float(n.max() / n.mean()),
        "empty_columns": int((n == 0).sum()),
        "entropy": float(-(share * np.log(share)).sum() / np.log(len(n))) if len(n) > 1 else 1.0,
        "row_min": int(rows.min()),
        "row_mean": float(rows.mean()),
        "row_max": int(rows.max()),
        "empty_rows": int((rows == 0).sum()),
    }


def heat_map(found: Loads, space: LoRALayout) -> pd.DataFrame:
    """The heat map, long: layer and factor, first coordinate of a group, its share of the group's squares."""
    keys = [f"{layer_of(block.module)} {block.factor}" for block in space.blocks]
    summed = _by_key(found, keys)
    starts = np.unique(np.linspace(0, summed.shape[1], GROUPS, endpoint=False).astype(int))
    grouped = np.add.reduceat(summed, starts, axis=1)
    share = grouped / np.maximum(grouped.sum(axis=0), 1e-300)
    table = pd.DataFrame(share, index=list(dict.fromkeys(keys)), columns=starts)
    long = table.rename_axis("layer").reset_index().melt("layer", var_name="coordinate", value_name="share")
    return long.assign(coordinate=long["coordinate"].astype(int))


def sharing(chosen: Sequence[Choice], space: LoRALayout, d: int, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(a row per projection and choice of hyperparameters as in `describe`, the heat maps as in `heat_map`)."""
    rows, maps = [], []
    for entry in bar(entries(chosen, space, d, seed), "sharing", len(chosen)):
        entry, found = entry.attempt(loads)
        rows.append({**entry.row(), **(describe(found, space) if found else {})})
        if found:
            maps.append(heat_map(found, space).assign(projection=entry.name, variant=entry.label))
    return pd.DataFrame(rows), pd.concat(maps, ignore_index=True) if maps else pd.DataFrame()
