"""From a P that holds PEFT's own frozen numbers to one that uniproj makes again from a seed, or to the identity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor

from uniproj.errors import ProjectionError
from uniproj.projection import Projection
from uniproj.projections._partition import Partition
from uniproj.projections.lora import LoRA
from uniproj.projections.tinylora import TinyLoRA
from uniproj.projections.vblora import VBLoRA
from uniproj.registry import build, get, names

_SAME = 1e-6  # relative: PEFT holds in float32 what is drawn in float64 here
# a logit that far below the others has no weight in float32
_FAR_BELOW = 100.0


@dataclass(frozen=True)
class Native:
    """theta_d (d,) float64 of a P that `build` makes from its name, its seed and these hyperparameters."""

    projection: Projection
    theta_d: Tensor
    hyperparameters: dict[str, Any]


@torch.no_grad()
def native(
    kind: str, config: PeftConfig, P: Projection, theta_d: Tensor, order: tuple[str, ...], weights: Mapping | None
) -> Native:
    """The same theta_D from a P of the registry: by the seed in PEFT's configuration where that gives its numbers.

    order: PEFT's order of registration; weights: the base model's, for TINYLORA. Falls back on `lora`, where theta_d is
    theta_D itself.
    """
    if isinstance(P, VBLoRA):
        return _vblora(P, theta_d)
    seed = {"UNILORA": "proj_seed", "VERA": "projection_prng_key", "TINYLORA": "projection_seed"}[kind]
    for name, hyperparameters in _candidates(kind, P, config, order):
        options = hyperparameters | ({"base_weights": weights} if get(name).needs_base_weights else {})
        size = {"d": P.d} if get(name).free_d else {}
        try:
            found = build(name, layout=P.layout, seed=getattr(config, seed), **size, **options)
        except ProjectionError:
            continue  # a seed or a size that this one does not take
        if found.d == P.d and (moved := _moved(P, found, theta_d)) is not None:
            return Native(found, moved, hyperparameters)
    return Native(LoRA(P.layout), P(theta_d), {})


def _candidates(
    kind: str, P: Projection, config: PeftConfig, order: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, Any]]]:
    if kind == "UNILORA":
        positions = [P.layout.modules.index(module) for module in order]
        yield "unilora", {"assignment": "peft", "module_order": positions}
        for name in names():
            if issubclass(get(name), Partition):
                yield from ((name, dict(variant)) for variant in get(name).variants)
    elif kind == "VERA":
        yield from (("vera", dict(variant)) for variant in get("vera").variants)
    else:
        yield "tinylora", {"u": config.u, "weight_tying": config.weight_tying}


def _moved(theirs: Projection, ours: Projection, theta_d: Tensor) -> Tensor | None:
    """The theta_d of `ours` that gives what `theirs` makes of theta_d, or None if no theta_d does."""
    if isinstance(theirs, Partition) and isinstance(ours, Partition):
        # one scale per coordinate: where it was rounded, theta_d takes the difference
        return theta_d * theirs.scale / ours.scale if torch.equal(theirs.index, ours.index) else None
    same = theirs.name == ours.name and all(
        torch.allclose(mine.double(), theirs.constants()[name].double(), rtol=_SAME, atol=_SAME)
        for name, mine in ours.constants().items()
    )
    if same and isinstance(theirs, TinyLoRA) and isinstance(ours, TinyLoRA):
        return _regrouped(theirs, ours, theta_d)
    return theta_d if same else None


def _regrouped(theirs: TinyLoRA, ours: TinyLoRA, theta_d: Tensor) -> Tensor | None:
    """theta_d with its groups of u numbers in our order, or None where other modules share them."""
    pairs = set(zip(ours.group, theirs.group, strict=True))
    order = dict(pairs)
    if len(order) < len(pairs) or len(set(order.values())) < len(order):
        return None
    return theta_d.view(-1, ours.u)[[order[group] for group in sorted(order)]].flatten()


def _vblora(P: VBLoRA, theta_d: Tensor) -> Native:
    hyperparameters = {"num_vectors": P.h, "vector_length": P.b, "topk": P.topk}
    found = VBLoRA(P.layout, **hyperparameters)
    # an adapter that saved its top logits alone has -inf in place of the others
    finite = P.logits.masked_fill(P.logits.isinf(), torch.inf)
    least = finite.amin(-1, keepdim=True) - _FAR_BELOW
    found.logits.copy_(torch.where(P.logits.isinf(), least, P.logits))
    return Native(found, theta_d, hyperparameters)
