"""Turns alternate, and the interval of a median covers it as often as the binomial law says."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from experiments.timing import LEAST_VALUES, compare_steps, interleave, median_interval


def test_turns_alternate_and_warm_up_is_dropped() -> None:
    order: list[str] = []

    def action(name: str):
        return lambda: (order.append(name), f"{name}{order.count(name)}")[1]

    found = interleave([action("a"), action("b"), action("c")], rounds=3, warm_up=1)
    assert "".join(order) in ("abccbaabccba", "cbaabccbaabc")
    assert found == [["a2", "b2", "c2"], ["a3", "b3", "c3"], ["a4", "b4", "c4"]]


@pytest.mark.parametrize("n", [6, 7, 8, 9, 10, 12, 15])
def test_the_interval_is_the_narrowest_that_covers_95_percent(n: int) -> None:
    """Every value lies above or below the true median with probability 1/2: all 2^n cases are counted."""
    median, low, high = median_interval(np.random.default_rng(n).permutation(n))
    assert median == np.median(range(n)) and low + high == n - 1
    below = [sum(signs) for signs in itertools.product((0, 1), repeat=n)]

    def coverage(rank: int) -> float:
        return float(np.mean([rank < count < n - rank for count in below]))

    # the interval from the value of rank `low` (from 0) holds the median where more than `low` values lie on each side
    assert coverage(int(low)) >= 0.95 > coverage(int(low) + 1)


def test_too_few_values_are_refused() -> None:
    with pytest.raises(ValueError, match=f"at least {LEAST_VALUES} values, got 5"):
        median_interval([1.0] * 5)


class _Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.steps = 0

    def forward(self, x: torch.Tensor):
        self.steps += 1
        return type("Output", (), {"loss": (self.weight * x).sum()})


def test_both_models_take_equally_many_steps() -> None:
    models = [_Loss(), _Loss()]
    found = compare_steps(
        *models, {"x": torch.ones(3)}, lambda m: torch.optim.SGD(m.parameters(), 0.1), False, pairs=6, warm_up=2
    )
    assert [m.steps for m in models] == [8, 8] and found["step_pairs"] == 6
    assert [m.weight.item() for m in models] == pytest.approx([1 - 8 * 0.1 * 3] * 2)
    assert found["step_ratio_low"] <= found["step_ratio"] <= found["step_ratio_high"]
