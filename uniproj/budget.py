"""Equal budgets: which hyperparameters give a method a wanted count of trained numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

TOLERANCE = 0.02


@dataclass(frozen=True)
class Budget:
    """How to build a method so that it trains `trained` numbers. `d` is None where the layout decides it."""

    r: int
    trained: int
    d: int | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)

    def error(self, budget: int) -> float:
        """Relative distance from the wanted budget, signed; beyond TOLERANCE a comparison must say so."""
        return self.trained / budget - 1.0


def nearest(
    budget: int,
    ranks: Iterable[int],
    count: Callable[..., int],
    options: Iterable[Mapping[str, Any]] = ({},),
) -> Budget:
    """The (rank, hyperparameters) whose `count(r, **hyperparameters)` is nearest to the budget; ties to lower rank."""
    found = [Budget(r, count(r, **extra), None, extra) for extra in options for r in ranks]
    return min(found, key=lambda b: (abs(b.trained - budget), b.r))
