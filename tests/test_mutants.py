"""The battery can fail: every mutant is caught by the checks it names."""

import pytest
import torch

from tests.mutants import MUTANTS
from uniproj import LoRALayout, Projection
from uniproj.testing import BatteryFailure, check_projection

LAYOUT = LoRALayout.from_shapes({f"h.{i}.{m}": (6, 4) for i in range(2) for m in ("q", "v")}, r=2)


def _build(mutant: type[Projection]) -> Projection:
    if mutant.needs_base_weights:
        W = {m: torch.randn(shape, dtype=torch.float64) for m, shape in LAYOUT.shapes().items()}
        return mutant(LAYOUT, base_weights=W)
    return mutant(LAYOUT, d=13) if mutant.free_d else mutant(LAYOUT)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_caught(mutant: type[Projection]) -> None:
    with pytest.raises(BatteryFailure) as failure:
        check_projection(_build(mutant))
    assert mutant.caught_by <= {c.name for c in failure.value.checks if not c.passed}
    assert mutant.name in str(failure.value)
