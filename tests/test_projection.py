"""What the base class gives to a class: casts, hyperparameters, claims under a condition."""

import ast
import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import uniproj
from uniproj import LoRALayout, Projection, ProjectionError, build, get, names, registry
from uniproj.testing import sample

LAYOUT = LoRALayout.from_shapes({f"h.{i}.{m}": (8, 4) for i in range(2) for m in "qv"}, r=2)


class Doubled(get("unilora")):
    """Overrides one of two maps that cast themselves, with the one argument that every method may write."""

    name = "doubled"

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        assert theta_D.dtype in (torch.float32, torch.float64)
        return 2 * super()._rmatvec(theta_D)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_map_written_anew_gets_float32_or_better_and_no_dtype(dtype: torch.dtype) -> None:
    theirs, ours = build("unilora", 40, 5), Doubled(LoRALayout.flat(40), 5)
    x, y = torch.ones(5, dtype=dtype), torch.arange(40).to(dtype)
    assert theirs.casts and not ours.casts
    assert torch.equal(ours(x), theirs(x)) and ours(x, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(ours.adjoint(y), 2 * theirs.adjoint(y)) and ours.adjoint(y).dtype == dtype


class DoubledByMixin:
    """Rewrites a map in a class of its own, before that of the method."""

    def _matvec(self, theta_d: Tensor) -> Tensor:
        return 2 * super()._matvec(theta_d)


class DoubledOutside(get("unilora")):
    """Rewrites the public map and not the one beneath it."""

    def matvec(self, theta_d: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return 2 * super().matvec(theta_d, dtype)


def test_a_map_of_a_mixin_or_a_public_one_written_anew_counts() -> None:
    x = torch.randn(5)
    mixed = type("Mixed", (DoubledByMixin, get("unilora")), {})
    for cls in (mixed, type("Below", (mixed,), {}), DoubledOutside):
        assert torch.equal(cls(LoRALayout.flat(40), 5)(x), 2 * build("unilora", 40, 5)(x))


class DoubledXS(get("lora_xs")):
    """Overrides the product of a method whose forward writes c in the same pass."""

    name = "doubled_xs"

    def _matvec(self, theta_d: Tensor) -> Tensor:
        return 2 * super()._matvec(theta_d)


def test_a_product_written_anew_counts_where_the_forward_is_the_parents_own() -> None:
    weights = {name: torch.randn(shape) for name, shape in LAYOUT.shapes().items()}
    theirs, ours = (cls(LAYOUT, weights) for cls in (get("lora_xs"), DoubledXS))
    x, c = torch.randn(theirs.d), theirs.offset.float()
    torch.testing.assert_close(ours(x) - c, 2 * (theirs(x) - c))


class XSWithoutC(get("lora_xs")):
    """Overrides c and the adjoint, and not the product."""

    name = "xs_without_c"
    offset = None

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        return 3 * super()._rmatvec(theta_D)


def test_a_c_and_an_adjoint_written_anew_count_there_too() -> None:
    weights = {name: torch.randn(shape) for name, shape in LAYOUT.shapes().items()}
    P = XSWithoutC(LAYOUT, weights)
    x, y = torch.randn(P.d, requires_grad=True), torch.randn(P.D)
    theta_D = P(x)
    assert torch.equal(theta_D, P.matvec(x.detach()))
    assert torch.equal(torch.autograd.grad(theta_D, x, y)[0], P.adjoint(y))


@pytest.mark.parametrize("name", names())
def test_a_wider_result_has_the_bits_of_a_wider_theta_d(name: str) -> None:
    P = sample(name, LAYOUT, 16, seed=1, **get(name).variants[0])
    for given, wanted in ((torch.bfloat16, torch.float32), (torch.float32, torch.float64)):
        x = torch.randn(P.d, dtype=given)
        assert torch.equal(P(x, wanted), P(x.to(wanted)))


@pytest.mark.parametrize(
    ("name", "options", "claim", "holds"),
    [
        ("lora_xs", {}, "isometric", True),
        ("lora_xs", {"side": "A"}, "isometric", False),
        ("tinylora", {"u": 1}, "local", True),
        ("tinylora", {"u": 1, "weight_tying": 1.0}, "local", False),
        ("unilora", {"assignment": "peft"}, "uniform", True),
        ("unilora", {"assignment": "iid"}, "uniform", False),
        ("unilora_local", {"per": "module"}, "local", True),
        ("unilora_local", {}, "local", False),
        ("unilora_sparse", {"exclusive": True}, "orthogonal", True),
        ("unilora_sparse", {}, "orthogonal", False),
        ("tied_lora", {"trained": "AB"}, "linear", True),
        ("tied_lora", {"trained": "A"}, "linear", False),
        ("tied_lora", {"trained": "A"}, "affine", True),
    ],
)
def test_a_claim_under_a_condition_is_claimed_where_it_is_met(name: str, options, claim: str, holds: bool) -> None:
    P = sample(name, LAYOUT, 4, **options)
    assert (claim in P.claims) is holds and (claim in copy.deepcopy(P).claims) is holds
    assert claim not in get(name).claims and claim in get(name).claims_if


@pytest.mark.parametrize(("d", "holds"), [(24, True), (25, True), (64, False)])
def test_a_condition_may_be_of_the_sizes(d: int, holds: bool) -> None:
    """D = 96 is a multiple of 32, and not of 64."""
    assert ("isometric" in build("fastfood_sign", 96, d).claims) is holds


class Untyped(get("unilora")):
    def __init__(self, layout, d, seed=0, own=1.0):
        super().__init__(layout, d, seed)
        self.own = own


def test_hyperparameters_without_types_are_taken_and_others_named(monkeypatch) -> None:
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    registry.register("untyped")(Untyped)
    P = build("untyped", 40, 5, own=2.0)
    assert isinstance(P, Projection) and P.hyperparameters == {"own": P.own} and P.own == 2.0
    with pytest.raises(ProjectionError, match=r"untyped: unknown hyperparameters \['other'\]"):
        build("untyped", 40, 5, other=2.0)


HOME = Path(uniproj.__file__).parent
FILES = [HOME / "algebra.py", *sorted((HOME / "projections").glob("*.py"))]


def test_no_class_sets_a_field_before_its_base_is_made() -> None:
    nodes_of_all = (node for path in FILES for node in ast.walk(ast.parse(path.read_text())))
    for init in (node for node in nodes_of_all if getattr(node, "name", "") == "__init__"):
        nodes = list(ast.walk(init))
        made = [n.lineno for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) == "super().__init__"]
        fields = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
        assert [ast.unparse(n) for n in fields if made and n.lineno < min(made)] == [], ast.unparse(init)
