"""A method that is built, warm, and ready to be timed in turn with others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from analysis.overhead.memory import tensor_bytes, usable
from analysis.overhead.problem import Candidate, Method, Problem
from experiments.timing import now

# Seconds that one timing should last at least: short calls are repeated, so that the clock does not decide.
SHORTEST = 0.02
MOST_REPEATS = 200
# Seconds of one forward and adjoint beyond which a method is called once and not in turn with the others.
SLOW = 10.0


@dataclass
class Entrant:
    """A built method: build_seconds, resident bytes besides its trained numbers, and its first times in s."""

    name: str
    method: Method
    device: torch.device
    build_seconds: float
    resident: int
    first: tuple[float, float]

    @property
    def is_slow(self) -> bool:
        return sum(self.first) > SLOW

    def run(self) -> tuple[float, float]:
        """Seconds of one forward and of one adjoint, each the mean of as many calls as `SHORTEST` asks for."""
        forward_calls, adjoint_calls = (self._repeats(seconds) for seconds in self.first)
        return time_both(self.method, self.device, forward_calls, adjoint_calls)

    @staticmethod
    def _repeats(seconds: float) -> int:
        return min(MOST_REPEATS, max(1, math.ceil(SHORTEST / max(seconds, 1e-9))))


class TooLarge(Exception):
    """A method that would not fit into the memory that is free; the message says by how much."""


def enter(candidate: Candidate, problem: Problem) -> Entrant:
    """Build a method and warm it up, unless it is slow. Raises TooLarge before anything is built."""
    needed, limit = candidate.peak * problem.D, usable(problem.device)
    if needed > limit:
        raise TooLarge(f"needs about {needed / 1e9:.1f} GB, {limit / 1e9:.1f} GB are usable")
    problem.draw()
    before = tensor_bytes(problem.device)
    started = now(problem.device)
    method = candidate.build(problem)
    build_seconds = now(problem.device) - started
    first = time_both(method, problem.device, 1, 1)
    trained = sum(tensor.nbytes for tensor in method.trained)
    # after a first call, which may have kept something
    resident = tensor_bytes(problem.device) - before - trained
    entrant = Entrant(candidate.name, method, problem.device, build_seconds, resident, first)
    if not entrant.is_slow:
        entrant.first = time_both(method, problem.device, 1, 1)
    return entrant


def time_both(method: Method, device: torch.device, forward_calls: int, adjoint_calls: int) -> tuple[float, float]:
    """Mean seconds of a forward and of an adjoint; the result of the last forward is kept for the adjoints."""
    output: Any = None
    started = now(device)
    for _ in range(forward_calls):
        output = method.forward()
    middle = now(device)
    for _ in range(adjoint_calls):
        method.adjoint(output)
    return (middle - started) / forward_calls, (now(device) - middle) / adjoint_calls
