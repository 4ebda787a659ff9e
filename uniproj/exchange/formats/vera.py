"""PEFT's VERA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft import VeraConfig
from torch import Tensor

from uniproj.exchange.formats._peft import Attached, Candidate, Pair, PeftMethod
from uniproj.exchange.registry import register
from uniproj.projections.vera import VeRA
from uniproj.registry import get
from uniproj.tuner.config import UniProjConfig


@register("vera")
class VeRAFormat(PeftMethod):
    """Its frozen matrices are saved."""

    kind, config, accepts = "VERA", VeraConfig, VeRA

    def build(self, theirs: Attached) -> VeRA:
        """P at its start; `pairs` has the matrices."""
        return VeRA(theirs.layout, theirs.config.projection_prng_key)

    def pairs(self, theirs: Attached, P: VeRA, theta_d: Tensor) -> Iterator[Pair]:
        fixed = theirs.fixed_without("save_projection")
        sharing = sorted(next(iter(theirs.layers.values())).vera_A)
        if len(sharing) > 1:
            fixed = f"adapters {sharing} share it"
        parts = theta_d.split([side.numbers for side in P.sides])
        for side, part, name in zip(P.sides, parts, ("vera_lambda_b", "vera_lambda_d"), strict=True):
            for block, ours in zip(side.blocks, part.split(side.scaler_sizes), strict=True):
                yield Pair(f"{block.module}.{name}", theirs.tensor(block.module, name), ours)
        (out, _), (_, in_) = P.sides[0].sizes[0], P.sides[1].sizes[0]
        yield Pair("vera_B", theirs.shared("vera_B")[:out], P.B.view(out, -1), fixed)
        yield Pair("vera_A", theirs.shared("vera_A")[:, :in_], P.A.view(-1, in_), fixed)

    def fields(self, P: VeRA, config: UniProjConfig) -> dict[str, Any]:
        """The seed."""
        return {"projection_prng_key": P.seed}

    def candidates(self, P: VeRA, config: Any, order: tuple[str, ...]) -> Iterator[Candidate]:
        """VeRA with each rule for drawing the matrices."""
        yield from (("vera", config.projection_prng_key, dict(variant)) for variant in get("vera").variants)
