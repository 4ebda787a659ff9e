"""What the registry says of each projection, and what a small instance of it measures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

import uniproj
from uniproj import LoRALayout, Projection
from uniproj.claims import CHECKS
from uniproj.testing import sample

LAYOUT = LoRALayout.from_shapes({f"layer.{i}.{m}": (16, 16) for i in range(4) for m in ("query", "value")}, r=4)
_D_SMALL = 120
SPACE = "eight modules of 16 x 16 at rank 4: D = 1,024, d = 120 where it is free"
# measured whether claimed or not: the three words by which the field tells methods apart
_ALWAYS = ("isometric", "uniform", "global_sharing")
# below it, a figure is rounding and differs from machine to machine
ROUNDING = 1e-12
_CORNER = 64


def describe(name: str) -> dict[str, Any]:
    """Formula, d, source and claims of a projection, as its class states them."""
    cls = uniproj.get(name)
    return {
        "name": name,
        "formula": cls.formula,
        "d_formula": cls.d_formula,
        "source": cls.source,
        "kind": "learned" if cls.learned else "affine" if "affine" in cls.claims else "linear",
        "claims_if": {claim: condition for claim, (condition, _) in cls.claims_if.items()},
    }


def instance(name: str) -> Projection:
    """The projection on `SPACE`."""
    return sample(name, LAYOUT, _D_SMALL)


def verdicts(P: Projection) -> pd.DataFrame:
    """One row per claim and for each of `_ALWAYS`: claim, claimed, holds, value, what the value is."""
    rows = []
    within_one_module = CHECKS["local"](P).holds
    for claim, decide in CHECKS.items():
        if claim in P.claims or claim in _ALWAYS:
            measured = decide(P)
            # a coordinate of a single row reaches as many modules as one drawn at random would, and shares nothing
            holds = measured.holds and not (claim == "global_sharing" and within_one_module)
            rows.append(
                {
                    "claim": claim, "claimed": claim in P.claims, "holds": holds,
                    "value": shown(measured.value), "what": measured.what,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def shown(value: float) -> float:
    """Three significant digits, and 0 for what is rounding."""
    return float(f"{value:.3g}") if abs(value) > ROUNDING else 0.0


def gram(P: Projection) -> np.ndarray:
    """The first 64 rows and columns of P^T P, in float64."""
    M = P.to_dense().detach()[:, :_CORNER].cpu().numpy()
    return M.T @ M


def sharing(P: Projection) -> np.ndarray:
    """Rows of each B and A (by module) that each of the first 64 coordinates reaches: (blocks, 64) counts."""
    hits = (P.to_dense().detach()[:, :_CORNER] != 0).cpu()
    return torch.stack([hits[block.rows].sum(0) for block in P.layout.blocks]).numpy()


def card(name: str) -> dict[str, Any]:
    """All of it for one projection, matrices too; `failed` says why nothing was measured of one that raised."""
    try:
        P = instance(name)
        matrices = {"verdicts": verdicts(P).to_dict("records"), "gram": gram(P), "sharing": sharing(P)}
        return {**describe(name), "D": P.D, "d": P.d, "trained": P.trained, **matrices}
    except Exception as error:  # a projection may be anybody's, and costs the page nothing
        return {**describe(name), "failed": f"{type(error).__name__}: {error}"}
