"""Hypothesis strategies: layouts of 1 to 12 modules with odd shapes and ranks 1 to 16, and projections on them."""

from __future__ import annotations

from typing import Any

from hypothesis import reject
from hypothesis import strategies as st

from uniproj import LoRALayout, Projection, ProjectionError, get
from uniproj.projections._shared import SharedFactors
from uniproj.testing import sample

_MAX_D = 480  # rows of theta_D: the identity then has 480^2 entries
_MAX_ENTRIES = 60_000
_TYPES = ("q_proj", "v_proj", "mlp.down")


@st.composite
def layouts(draw: st.DrawFn, one_rank: bool = False, rank_fits: bool = False) -> LoRALayout:
    modules = draw(st.integers(1, 12))
    rank = draw(st.integers(1, 16))
    largest = max(1, min(13, _MAX_D // (2 * modules * rank)))
    sizes = st.integers(1, largest)
    shapes = {f"layers.{i // 2}.{_TYPES[i % 3]}": (draw(sizes), draw(sizes)) for i in range(modules)}
    ranks = {m: rank if one_rank else draw(st.integers(1, rank)) for m in shapes}
    if rank_fits:
        ranks = {m: min(r, *shapes[m]) for m, r in ranks.items()}
    return LoRALayout.from_shapes(shapes, ranks)


@st.composite
def projections(draw: st.DrawFn, name: str, variant: dict[str, Any]) -> Projection:
    cls = get(name)
    layout = draw(layouts(one_rank=issubclass(cls, SharedFactors), rank_fits=cls.needs_base_weights))
    top = max(cls.min_d(layout), min(layout.D, _MAX_ENTRIES // layout.D))
    if variant.get("assignment") == "iid":
        top = max(1, layout.D // 24)  # denser draws leave columns empty, which is refused
    d = draw(st.integers(min(cls.min_d(layout), top), top))
    seed = draw(st.integers(0, 2**40))
    if variant == cls.variants[0]:
        return sample(name, layout, d, seed, **variant)
    try:
        return sample(name, layout, d, seed, **variant)
    except ProjectionError:  # hyperparameters that do not fit a tiny space; the first variant fits every space
        reject()
