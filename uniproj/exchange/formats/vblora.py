"""PEFT's VBLORA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftConfig, VBLoRAConfig
from torch import Tensor

from uniproj.exchange.formats._peft import Attached, Pair, PeftMethod
from uniproj.exchange.registry import register
from uniproj.projection import Projection
from uniproj.projections.vblora import VBLoRA
from uniproj.tuner.config import UniProjConfig

# a logit that far below the others has no weight in float32
_FAR_BELOW = 100.0


@register("vblora")
class VBLoRAFormat(PeftMethod):
    """P is learned, so all of it is in the file, and no seed gives it."""

    kind, config, accepts = "VBLORA", VBLoRAConfig, VBLoRA

    def build(self, theirs: Attached) -> VBLoRA:
        h, b = theirs.shared("vblora_vector_bank").shape
        return VBLoRA(theirs.layout, num_vectors=h, vector_length=b, topk=theirs.shared("topk"))

    def pairs(self, theirs: Attached, P: VBLoRA, theta_d: Tensor) -> Iterator[Pair]:
        yield Pair("vblora_vector_bank", theirs.shared("vblora_vector_bank"), theta_d.view(P.h, P.b))
        yield Pair("topk", torch.tensor(theirs.shared("topk")), torch.tensor(P.topk), "PEFT's config decides it")
        parts = P.logits.detach().split([block.numel // P.b for block in P.layout.blocks])
        for block, ours in zip(P.layout.blocks, parts, strict=True):
            pieces = (block.shape[0] // P.b, block.shape[1]) if block.factor == "B" else (block.shape[0], -1)
            name = f"vblora_logits_{block.factor}"
            yield Pair(f"{block.module}.{name}", theirs.tensor(block.module, name), ours.view(*pieces, P.h))

    def fields(self, P: VBLoRA, config: UniProjConfig) -> dict[str, Any]:
        """The sizes."""
        return _sizes(P)

    def rebuilt(
        self, P: Any, theta_d: Tensor, config: PeftConfig, order: tuple[str, ...], weights: Mapping | None
    ) -> tuple[Projection, Tensor, dict[str, Any]]:
        """The same logits; an adapter that saved its top logits alone has -inf in place of the others."""
        found = VBLoRA(P.layout, **_sizes(P))
        finite = P.logits.detach().masked_fill(P.logits.isinf(), torch.inf)
        least = finite.amin(-1, keepdim=True) - _FAR_BELOW
        with torch.no_grad():
            found.logits.copy_(torch.where(P.logits.isinf(), least, P.logits))
        return found, theta_d, _sizes(P)


def _sizes(P: VBLoRA) -> dict[str, Any]:
    return {"num_vectors": P.h, "vector_length": P.b, "topk": P.topk}
