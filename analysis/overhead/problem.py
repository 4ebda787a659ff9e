"""What is asked of every method: theta_D = P theta_d and P^T y for one layout, and what a method must offer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from uniproj import LoRALayout

SEED = 0


@dataclass(frozen=True)
class Method:
    """P as two functions. `adjoint` is given what `forward` returned, which holds the graph where autograd is used.

    trained: the trained numbers that the method holds itself; they are not counted as its state.
    """

    forward: Callable[[], Any]
    adjoint: Callable[[Any], Any]
    trained: Sequence[Tensor] = ()


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

    def draw(self) -> None:
        """Draw x and y now, so that they count for no method."""
        _ = self.x, self.y

    def draw_partition(self) -> None:
        """Draw index and scale now, so that they count for no method."""
        _ = self.index, self.scale

    def draw_base_weights(self) -> None:
        """Draw the base weights now, so that they count for no method."""
        _ = self.base_weights

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
