"""What is asked of every method: theta_D = P theta_d and P^T y for one layout; and a method that is built and timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from analysis.overhead.memory import tensor_bytes, usable
from experiments.timing import now
from uniproj import LoRALayout

SEED = 0
# Seconds that one timing should last at least: short calls are repeated, so that the clock does not decide.
_SHORTEST = 0.02
_MOST_REPEATS = 200
# Seconds of one forward and adjoint beyond which a method is called once and not in turn with the others.
SLOW = 10.0
# per second, of a GPU at the clock of an H100; seconds
_CYCLES, _LONGEST_WAIT = 2e9, 0.1


@dataclass(frozen=True)
class Method:
    """P as two functions. `adjoint` is given what `forward` returned, which holds the graph where autograd is used.

    parameters: the trained numbers that the method holds itself; they are not counted as its state.
    """

    forward: Callable[[], Any]
    adjoint: Callable[[Any], Any]
    parameters: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Problem:
    """A layout, a d, a device, and the float32 vectors that every method gets."""

    layout: LoRALayout
    d: int
    device: torch.device
    _generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(SEED))

    @property
    def D(self) -> int:
        return self.layout.D

    def draw(self, *names: str) -> None:
        """Draw these of the vectors below now, so that they count for no method."""
        for name in names:
            getattr(self, name)

    @cached_property
    def base_weights(self) -> dict[str, Tensor]:
        """W (out, in) of every module, Gaussian."""
        return {m: torch.randn(shape, generator=self._generator) for m, shape in self.layout.shapes().items()}

    @cached_property
    def x(self) -> Tensor:
        """theta_d (d,)."""
        return torch.randn(self.d, generator=self._generator).to(self.device)

    @cached_property
    def y(self) -> Tensor:
        """A gradient on theta_D (D,)."""
        return torch.randn(self.D, generator=self._generator).to(self.device)

    @cached_property
    def index(self) -> Tensor:
        """(D,) int64 on the CPU: a balanced random partition, of the law that uniproj and PEFT use."""
        return torch.randperm(self.D, generator=self._generator) % self.d

    @cached_property
    def scale(self) -> Tensor:
        """(d,) float32: 1 / sqrt(n_j)."""
        return torch.bincount(self.index, minlength=self.d).float().rsqrt().to(self.device)


@dataclass(frozen=True)
class Candidate:
    """A method by name. `peak` is the bytes per coordinate of theta_D that building and running it may take."""

    name: str
    build: Callable[[Problem], Method]
    peak: float


def backward(outputs: Any, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """autograd's adjoint of a kept graph, which may be walked again."""
    return torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)


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
        """Seconds of one forward and of one adjoint, each the mean of as many calls as `_SHORTEST` asks for."""
        forward_calls, adjoint_calls = (self._repeats(seconds) for seconds in self.first)
        return _time_both(self.method, self.device, forward_calls, adjoint_calls)

    def run_on_gpu(self) -> tuple[float, float]:
        """The same without the time in which the GPU waits for the processor, which launches kernels one by one.

        It waits for about a thousand launches at most: of a method with more kernels this time has the rest in it.
        """
        forward = _time_on_gpu(self.method.forward, self.first[0], self._repeats(self.first[0]))
        output = self.method.forward()
        return forward, _time_on_gpu(lambda: self.method.adjoint(output), self.first[1], self._repeats(self.first[1]))

    @staticmethod
    def _repeats(seconds: float) -> int:
        return min(_MOST_REPEATS, max(1, math.ceil(_SHORTEST / max(seconds, 1e-9))))


class TooLarge(Exception):
    """A method that would not fit into the memory that is free; the message says by how much."""


def enter(candidate: Candidate, problem: Problem) -> Entrant:
    """Build a method and warm it up, unless it is slow. Raises TooLarge before anything is built."""
    needed, limit = candidate.peak * problem.D, usable(problem.device)
    if needed > limit:
        raise TooLarge(f"needs about {needed / 1e9:.1f} GB, {limit / 1e9:.1f} GB are usable")
    problem.draw("x", "y")
    before = tensor_bytes(problem.device)
    started = now(problem.device)
    method = candidate.build(problem)
    build_seconds = now(problem.device) - started
    first = _time_both(method, problem.device, 1, 1)
    trained = sum(tensor.nbytes for tensor in method.parameters)
    # after a first call, which may have kept something
    resident = tensor_bytes(problem.device) - before - trained
    entrant = Entrant(candidate.name, method, problem.device, build_seconds, resident, first)
    if not entrant.is_slow:
        entrant.first = _time_both(method, problem.device, 1, 1)
    return entrant


def _time_on_gpu(call: Callable[[], Any], seconds: float, calls: int) -> float:
    """Mean seconds of the GPU; `seconds` is what a call takes with the processor's part."""
    # the GPU is busy for as long as the calls need to get into its queue
    torch.cuda._sleep(int(_CYCLES * min(_LONGEST_WAIT, 1.5 * calls * seconds)))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def _time_both(method: Method, device: torch.device, forward_calls: int, adjoint_calls: int) -> tuple[float, float]:
    """Mean seconds of a forward and of an adjoint; the result of the last forward is kept for the adjoints."""
    output: Any = None
    started = now(device)
    for _ in range(forward_calls):
        output = method.forward()
    middle = now(device)
    for _ in range(adjoint_calls):
        method.adjoint(output)
    return (middle - started) / forward_calls, (now(device) - middle) / adjoint_calls
