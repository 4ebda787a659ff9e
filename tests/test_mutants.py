"""The battery can fail: every mutant is caught by the checks it names."""

import pytest
import torch
from torch import nn

from tests.mutants import MUTANTS, DetachedLogits, LearnedInSecret
from uniproj import LoRALayout, Projection, ProjectionError, get, names, register
from uniproj.testing import BATTERY, BatteryFailure, check_projection

LAYOUT = LoRALayout.from_shapes({f"h.{i}.{m}": (6, 4) for i in range(2) for m in ("q", "v")}, r=2)


def _build(mutant: type[Projection]) -> Projection:
    if mutant.needs_base_weights:
        W = {m: torch.randn(shape, dtype=torch.float64) for m, shape in LAYOUT.shapes().items()}
        return mutant(LAYOUT, base_weights=W)
    return mutant(LAYOUT, d=13) if mutant.free_d else mutant(LAYOUT)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_caught(mutant: type[Projection]) -> None:
    only = BATTERY.keys() - ({"compiles", "exports"} - mutant.caught_by)  # the longest, where they say nothing
    with pytest.raises(BatteryFailure) as failure:
        check_projection(_build(mutant), only=only)
    assert mutant.caught_by <= {c.name for c in failure.value.checks if not c.passed}
    assert mutant.name in str(failure.value)


def test_an_undeclared_parameter_is_named() -> None:
    P = LearnedInSecret(LAYOUT, d=13)
    with pytest.raises(BatteryFailure, match=r"gradcheck: .*P holds Parameters \(gain\).*Set learned = True"):
        check_projection(P, only=["gradcheck"])
    with pytest.raises(ProjectionError, match="Set learned = True"):
        P(torch.ones(13, requires_grad=True))
    P.requires_grad_(False)  # a constant that happens to be a Parameter
    assert P(torch.ones(13, requires_grad=True)).requires_grad


def test_a_buffer_of_a_module_inside_is_named() -> None:
    P = get("unilora")(LAYOUT, d=13)
    P.norm = nn.BatchNorm1d(3, affine=False)
    with pytest.raises(ProjectionError, match=r"got the buffer norm.running_mean of a module inside P"):
        P(torch.ones(13))


def test_a_wrong_gradient_is_named() -> None:
    with pytest.raises(BatteryFailure, match="with respect to logits"):
        check_projection(DetachedLogits(LAYOUT), only=["gradcheck"])


@pytest.mark.parametrize("where", ["claims", "claims_if"])
def test_an_unknown_claim_is_refused_with_the_nearest(where: str, monkeypatch) -> None:
    said = {"isometrc": ("never", lambda P: False)} if where == "claims_if" else frozenset({"linear", "isometrc"})
    monkeypatch.setattr(MUTANTS[0], where, said)
    P = _build(MUTANTS[0])
    for refused in (lambda: check_projection(P), lambda: register("isometrc")(type(P))):
        with pytest.raises(ProjectionError, match=r"unknown claim 'isometrc'\. Did you mean 'isometric'"):
            refused()
    assert "isometrc" not in names()


def test_an_unknown_check_is_refused() -> None:
    with pytest.raises(ProjectionError, match=r"unknown check 'gradchek'.*gradcheck"):
        check_projection(_build(MUTANTS[0]), only=["gradchek"])
