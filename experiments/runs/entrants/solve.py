"""Which value of an option gives a count that is nearest to a budget, where each count takes a model to be built."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import cache


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


# kinds of values in the order of a growing count: of a bound that is the budget, the least width of a module, or the
# greatest common divisor of all widths
VALUES: Mapping[str, Callable[[int], Sequence[int]]] = {
    "integers": lambda budget: range(1, budget + 1),
    "even integers": lambda budget: range(2, budget + 2, 2),
    "falling integers": lambda least: range(least, 0, -1),
    "divisors": _divisors,
    "falling divisors": lambda common: _divisors(common)[::-1],
}


def nearest(count: Callable[[int], float], values: Sequence[int], budget: int) -> int:
    """The value whose count is nearest to the budget, ties to the smaller count; the first of equal counts.

    count: grows along `values`, infinite for a value that cannot be. It is asked few times: a straight line through two
    counts tells where to look, and halves where it leads astray.
    """
    last = len(values) - 1

    @cache
    def at(place: int) -> float:
        return count(values[place])

    low, high = 0, min(1, last)
    while high < last and at(high) < budget:
        slope = (at(high) - at(low)) / (high - low)
        further = math.ceil((budget - at(high)) / slope) if slope > 0 else 0
        low, high = high, min(last, high + max(high, further))
    halve = False
    while high - low > 1 and at(high) > budget:
        share = 0.5 if halve or math.isinf(at(high)) else (budget - at(low)) / (at(high) - at(low))
        middle = min(max(low + round(share * (high - low)), low + 1), high - 1)
        low, high = (middle, high) if at(middle) < budget else (low, middle)
        halve = not halve
    best = min((low, high), key=lambda place: abs(at(place) - budget))
    if best and at(best - 1) == at(best):
        best = bisect_left(range(best), at(best), key=at)
    return values[best]
