"""The spaces theta_D that projections are measured on, and every projection of the registry on one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModel

import uniproj
from analysis.overhead.shapes import LLAMA_2_7B, Shapes, growing, roberta_large_query_value
from experiments import models
from experiments.errors import ExperimentError
from uniproj import LoRALayout, Projection, ProjectionError
from uniproj.kernels.random import normal
from uniproj.testing import sample

# 10 million rows as in the layouts whose growth is measured: all linear layers of a Llama-like model
_MILLIONS = 1e7
# the name of a projection, and hyperparameters for it
Choice = tuple[str, Mapping[str, Any]]
T = TypeVar("T")


def _of_model(name: str) -> Shapes:
    """The modules that PEFT adapts by default, from the configuration of a model without its weights."""
    base = models.unloaded(AutoModel, name)
    targets = models.target_modules(name)
    linear = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear) and n.rsplit(".", 1)[-1] in targets}
    return {n: (m.out_features, m.in_features) for n, m in linear.items()}


LAYOUTS: Mapping[str, Callable[[], Shapes]] = {
    "eight-64": lambda: {f"layer.{i // 2}.{'query' if i % 2 else 'value'}": (64, 64) for i in range(8)},
    "roberta-large": roberta_large_query_value,
    "llama-2-7b": LLAMA_2_7B.all_linear,
    "ten-million": lambda: growing(_MILLIONS).shapes(),
}


def layout(name: str, rank: int) -> LoRALayout:
    """The layout of a named architecture or of a model that Transformers can configure.

    Raises ExperimentError for a name that is neither.
    """
    shapes = LAYOUTS[name]() if name in LAYOUTS else _of_model(name)
    if not shapes:
        raise ExperimentError(f"spaces: {name} must have linear modules that PEFT adapts by default, got none.")
    return LoRALayout.from_shapes(shapes, rank)


@dataclass(frozen=True)
class Entry:
    """A projection of the registry with one choice of hyperparameters, built on a layout, or why it cannot be."""

    name: str
    variant: Mapping[str, Any]
    P: Projection | None
    note: str = ""

    @property
    def label(self) -> str:
        """The name, and the hyperparameters that differ from the defaults."""
        chosen = ", ".join(f"{key}={value}" for key, value in self.variant.items())
        return f"{self.name} ({chosen})" if chosen else self.name

    def row(self) -> dict[str, Any]:
        """What every table says of a projection first."""
        sizes = {} if self.P is None else {"D": self.P.D, "d": self.P.d, "trained": self.P.trained}
        return {"projection": self.name, "variant": self.label, **sizes, "note": self.note}

    def attempt(self, measure: Callable[[Projection], T]) -> tuple[Entry, T | None]:
        """What `measure` finds of P; None where there is no P, or where it fails, and then the entry's note says so.

        A projection may be anybody's: its error costs the others nothing.
        """
        if self.P is None:
            return self, None
        try:
            return self, measure(self.P)
        except Exception as error:
            return replace(self, note=_note(error)), None


def variants(names: Sequence[str]) -> list[Choice]:
    """Each projection with each choice of hyperparameters that its class lists, the default first."""
    return [(name, variant) for name in names for variant in uniproj.get(name).variants]


def defaults(names: Sequence[str]) -> list[Choice]:
    """Each projection with the first choice of hyperparameters that its class lists."""
    return [(name, uniproj.get(name).variants[0]) for name in names]


def build(
    name: str,
    variant: Mapping[str, Any],
    space: LoRALayout,
    d: int,
    seed: int = 0,
    base_weights: Mapping[str, Tensor] | None = None,
) -> Entry:
    """The projection, or the sentence with which it refuses this space, or its error.

    base_weights: W (out, in) by module name for methods that need them; without any they are drawn.
    """
    options = dict(variant)
    if base_weights is not None and uniproj.get(name).needs_base_weights:
        options["base_weights"] = base_weights
    try:
        return Entry(name, variant, sample(name, space, min(d, space.D), seed, **options))
    except Exception as error:
        return Entry(name, variant, None, _note(error))


def _note(error: Exception) -> str:
    is_sentence = isinstance(error, (ProjectionError, ExperimentError))
    return str(error) if is_sentence else f"failed: {type(error).__name__}: {error}"


def entries(
    chosen: Sequence[Choice],
    space: LoRALayout,
    d: int,
    seed: int = 0,
    base_weights: Mapping[str, Tensor] | None = None,
) -> Iterator[Entry]:
    """The projections one after the other, so that only one is in memory."""
    for name, variant in chosen:
        yield build(name, variant, space, d, seed, base_weights)


def vectors(stream: str, count: int, size: int) -> Tensor:
    """(count, size) float64 normal numbers, the same on every machine."""
    return torch.stack([normal(0, stream, size, part=part).double() for part in range(count)])
