"""`rebuild`: the same P again, or that of another seed, from what a P keeps of its arguments."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from uniproj import LoRALayout, Projection, ProjectionError, build, get
from uniproj.algebra import BlockDiagonal, Compose, ConcatColumns, Restrict, Scale, Select

LAYOUT = LoRALayout.from_shapes({f"h.{i}.{m}": (8, 4) for i in range(2) for m in "qv"}, r=2)


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {m: torch.randn(shape, generator=generator) for m, shape in LAYOUT.shapes().items()}


def test_a_method_keeps_its_hyperparameters_and_takes_others() -> None:
    P = build("unilora", 40, 5, seed=3, assignment="iid")
    expected = {seed: build("unilora", 40, 5, seed=seed, assignment="iid").index for seed in (3, 4)}
    assert torch.equal(P.rebuild().index, expected[3]) and torch.equal(P.rebuild(seed=4).index, expected[4])
    assert torch.equal(P.rebuild(assignment="balanced", d=6).index, build("unilora", 40, 6, seed=3).index)


def test_a_class_of_ones_own_is_rebuilt_with_its_hyperparameters() -> None:
    class Own(get("unilora")):
        name = "own"

        def __init__(self, layout, d, seed=0, own=1.0):
            super().__init__(layout, d, seed)
            self.scale = own * self.scale

    P = Own(LAYOUT, 5, own=3.0)
    assert torch.equal(P.rebuild().to_dense(), P.to_dense())
    torch.testing.assert_close(P.to_dense(), 3 * build("unilora", layout=LAYOUT, d=5).to_dense())


@pytest.mark.parametrize(("name", "options"), [("lora_xs", {"side": "A"}), ("tinylora", {"u": 3})])
def test_base_weights_are_freed_and_asked_for(name: str, options: dict) -> None:
    base = weights()
    alive = [weakref.ref(W) for W in base.values()]
    P = build(name, layout=LAYOUT, seed=2, base_weights=base, **options)
    M = P.to_dense()
    del base
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(LAYOUT.modules)
    with pytest.raises(ProjectionError, match=f"{name}: rebuild needs the base weights.*Pass base_weights="):
        P.rebuild()
    assert torch.equal(P.rebuild(base_weights=weights()).to_dense(), M)


def unilora(seed: int, D: int = 40, d: int = 5) -> Projection:
    return build("unilora", D, d, seed=seed)


ROWS = torch.arange(3, 23)
COMPOSITES = {
    "concat_columns": lambda s: ConcatColumns([unilora(3 + s), unilora(4 + s)]),
    "block_diagonal": lambda s: BlockDiagonal([unilora(3 + s), unilora(9 + s)]),
    "compose": lambda s: Compose(unilora(1 + s), unilora(7 + s, D=5, d=2)),
    "select": lambda s: Select(LoRALayout.flat(40), ROWS),
    "nested": lambda s: Scale(Compose(Select(LoRALayout.flat(40), ROWS), unilora(6 + s, D=20)), 2.0),
    "restrict": lambda s: Restrict(build("nola", layout=LAYOUT, d=9, seed=5 + s), ["h.1.q", "h.0.v"]),
    "last_seed": lambda s: Scale(unilora((2**64 - 1 + s) % 2**64), 0.5),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_a_seed_moves_the_seeds_of_all_parts_by_as_much(name: str) -> None:
    P = COMPOSITES[name](0)
    moved = P.rebuild(seed=2)
    assert (P.seed, moved.seed, type(moved)) == (0, 2, type(P))
    assert torch.equal(moved.to_dense(), COMPOSITES[name](2).to_dense())
    assert torch.equal(moved.rebuild(seed=0).to_dense(), P.to_dense())
    assert torch.equal(moved.rebuild().to_dense(), moved.to_dense())
    assert name == "select" or not torch.equal(moved.to_dense(), P.to_dense())


def test_a_composite_is_rebuilt_with_parts_of_its_own() -> None:
    learned = build("vblora", layout=LAYOUT, num_vectors=9, vector_length=1)
    composite = Compose(learned, build("unilora", 9, 4))
    assert not {id(p) for p in composite.rebuild().parameters()} & {id(p) for p in composite.parameters()}


def test_a_composite_takes_no_hyperparameters() -> None:
    with pytest.raises(ProjectionError, match=r"scale: rebuild of a composite takes seed= alone, got \['alpha'\]"):
        Scale(unilora(0), 2.0).rebuild(alpha=3.0)


@pytest.mark.parametrize("name", ["sparse", "unilora_sparse"])
def test_a_method_written_as_a_composite_is_rebuilt_as_a_method(name: str) -> None:
    P = build(name, layout=LAYOUT, d=9, seed=3)
    again, other = P.rebuild(), P.rebuild(seed=8)
    assert (again.name, again.seed, other.seed) == (name, 3, 8)
    assert torch.equal(again.to_dense(), P.to_dense())
    assert torch.equal(other.to_dense(), build(name, layout=LAYOUT, d=9, seed=8).to_dense())
