"""Every projection on a small layout."""

from __future__ import annotations

import uniproj
from analysis.spaces import build
from uniproj import LoRALayout, Projection

SMALL = LoRALayout.from_shapes({f"layer.{i}.{m}": (12, 8) for i in range(3) for m in ("query", "value")}, r=2)


def small(name: str) -> Projection:
    """With its first hyperparameters, and d = 24 where it is free."""
    P = build(name, uniproj.get(name).variants[0], SMALL, 24).P
    assert P is not None
    return P
