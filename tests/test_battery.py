"""The battery over the whole registry: a new projection is tested by existing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.spaces import projections
from uniproj import LoRALayout, get, names
from uniproj.algebra import BlockDiagonal, Compose, ConcatColumns, Restrict, Scale, Select
from uniproj.testing import BATTERY, check_projection, sample

CASES = [(name, i) for name in names() for i in range(len(get(name).variants))]
# the longest checks: test_transforms.py makes programs of every method, the tests below of variants and composites
PROGRAMS = {"compiles", "exports"}


@pytest.mark.parametrize(("name", "i"), CASES, ids=lambda v: str(v))
@settings(max_examples=settings().max_examples // 2)
@given(data=st.data())
def test_battery(name: str, i: int, data: st.DataObject) -> None:
    check_projection(data.draw(projections(name, dict(get(name).variants[i]))), only=BATTERY.keys() - PROGRAMS)


LAYOUT = LoRALayout.from_shapes({f"h.{i}.{m}": (7, 5) for i in range(2) for m in ("q", "v")}, r=2)


@pytest.mark.parametrize(("name", "i"), [case for case in CASES if case[1]], ids=lambda v: str(v))
def test_every_variant_becomes_programs(name: str, i: int) -> None:
    check_projection(sample(name, LAYOUT, 16, **get(name).variants[i]), only=PROGRAMS)


def _uni(D: int, d: int, seed: int = 0):
    return sample("unilora", LoRALayout.flat(D), d, seed)


COMPOSITES = {
    "compose": lambda: Compose(sample("gaussian", LAYOUT, 20), _uni(20, 6)),
    "compose_affine": lambda: Compose(sample("sparse", LAYOUT, 20), _uni(20, 6)),
    "compose_learned": lambda: Compose(sample("vblora", LAYOUT, num_vectors=9, vector_length=1), _uni(9, 4)),
    "concat": lambda: ConcatColumns([sample("unilora", LAYOUT, 9), sample("fastfood", LAYOUT, 5)]),
    "block_diagonal": lambda: BlockDiagonal([_uni(11, 4), _uni(23, 5, 1)]),
    "block_diagonal_affine": lambda: BlockDiagonal([sample("nola", LAYOUT, 16), _uni(23, 5, 1)]),
    "block_diagonal_dense": lambda: BlockDiagonal([sample("gaussian", LAYOUT, 4), _uni(23, 5, 1)]),
    "restrict": lambda: Restrict(sample("unilora", LAYOUT, 9), ["h.1.q"]),
    "restrict_affine": lambda: Restrict(sample("nola", LAYOUT, 9), ["h.1.q", "h.0.v"]),
    "scale": lambda: Scale(sample("lora_xs", LAYOUT), -3.0),
    "select": lambda: Select(LAYOUT, LAYOUT.rows(["h.0.v"])),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_algebra_passes_the_battery(name: str) -> None:
    check_projection(COMPOSITES[name]())
