"""Every projection on a small layout; and what counting live tensors, a walk over every object, need not walk over."""

import gc
from collections.abc import Iterator

import pytest

import uniproj
from analysis.spaces import build
from uniproj import LoRALayout, Projection

SMALL = LoRALayout.from_shapes({f"layer.{i}.{m}": (12, 8) for i in range(3) for m in ("query", "value")}, r=2)


@pytest.fixture(params=uniproj.names())
def every_P(request: pytest.FixtureRequest) -> Projection:
    """With its first hyperparameters, and d = 24 where it is free."""
    P = build(request.param, uniproj.get(request.param).variants[0], SMALL, 24).P
    assert P is not None
    return P


@pytest.fixture(scope="module")
def few_objects() -> Iterator[None]:
    """Those of other modules are set aside."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
