"""PEFT's UNILORA: Uni-LoRA and every other partition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import UniLoraConfig
from torch import Tensor

from uniproj.errors import AdapterError
from uniproj.exchange.adapter import Adapter
from uniproj.exchange.formats._peft import Attached, Candidate, Pair, PeftMethod
from uniproj.exchange.registry import register
from uniproj.projections._partition import Partition
from uniproj.projections.unilora import UniLoRA
from uniproj.registry import get, names
from uniproj.tuner.config import UniProjConfig

_EXACT = 1e-10


@register("unilora")
class UniLoRAFormat(PeftMethod):
    """Indices and scales are saved unless PEFT draws the same ones from its seed and the order of the modules."""

    kind, config, accepts = "UNILORA", UniLoraConfig, Partition
    saved = {"save_indices": True}

    def build(self, theirs: Attached) -> UniLoRA:
        def per_row(what: str) -> Tensor:
            rows = {(b.module, b.factor): theirs.tensor(b.module, f"{what}_{b.factor}") for b in theirs.layout.blocks}
            return theirs.layout.flatten({block: row.cpu() for block, row in rows.items()})

        config = theirs.config
        options: dict[str, Any] = {"assignment": "peft", "module_order": list(theirs.layers)}
        P = UniLoRA(theirs.layout, config.theta_d_length, config.proj_seed, **options)
        index, scales = per_row("unilora_indices"), per_row("unilora_scales").double()
        if index.min() < 0 or index.max() >= P.d:
            raise AdapterError(
                f"from_peft: indices must lie in [0, {P.d}), got others. Copy or download the file again."
            )
        redealt = not torch.equal(index, P.index.long())
        scale = torch.zeros_like(P.scale).index_put_((index,), scales)
        odd = (scale[index] != scales).nonzero().flatten()
        if len(odd):
            row = int(odd[0])
            module = theirs.layout.modules[int(theirs.layout.module_index()[row])]
            raise AdapterError(
                f"from_peft: {module} must scale coordinate {int(index[row])} as every other row does, by "
                f"{scale[index[row]]:.6g}, got {scales[row]:.6g}. Its scales belong to other indices: regenerate both."
            )
        P.scale.copy_(scale)
        # PEFT keeps scales in the base weight's dtype, so its columns are unit vectors only to that precision
        if (torch.bincount(index, minlength=P.d) * scale**2 - 1.0).abs().max() > _EXACT:
            P.claims = P.claims - {"isometric"}
        if redealt:
            P.claims = P.claims - {"uniform", "global_sharing"}
        return P

    def pairs(self, theirs: Attached, P: Partition, theta_d: Tensor) -> Iterator[Pair]:
        yield Pair("unilora_theta_d", theirs.shared("unilora_theta_d"), theta_d)
        fixed = theirs.fixed_without("save_indices")
        # we hold one scale per coordinate, PEFT one per row: to copy into these temporary tensors has no effect, and
        # `build` has read both
        index, scales = P.layout.split(P.index), P.layout.split(P.scale[P.index.long()])
        for b, i, s in zip(P.layout.blocks, index, scales, strict=True):
            for name, ours in ((f"unilora_indices_{b.factor}", i), (f"unilora_scales_{b.factor}", s)):
                yield Pair(f"{b.module}.{name}", theirs.tensor(b.module, name), ours, fixed)

    def fields(self, P: Partition, config: UniProjConfig) -> dict[str, Any]:
        """d and the seed."""
        return {"theta_d_length": P.d, "proj_seed": P.seed}

    def draws_ours(self, adapter: Adapter, drawn: Partition) -> bool:
        """Whether the order of the modules is known, and gives these indices and scales."""
        P, known = adapter.projection, "module_order" in adapter.config.projection_kwargs
        if (adapter.order is None and not known) or not isinstance(P, Partition):
            return False
        close = torch.allclose(drawn.scale, P.scale.cpu(), rtol=1e-6, atol=0.0)
        return close and torch.equal(drawn.index, P.index.cpu())

    def candidates(self, P: Partition, config: Any, order: tuple[str, ...]) -> Iterator[Candidate]:
        """PEFT's own rule, then every partition of the registry."""
        positions = [P.layout.modules.index(module) for module in order]
        yield "unilora", config.proj_seed, {"assignment": "peft", "module_order": positions}
        for name in names():
            if issubclass(get(name), Partition):
                yield from ((name, config.proj_seed, dict(variant)) for variant in get(name).variants)

    def moved(self, theirs: Partition, ours: Any, theta_d: Tensor) -> Tensor | None:
        """theta_d times the ratio of the scales, as PEFT may have rounded its own."""
        return theta_d * theirs.scale / ours.scale if torch.equal(theirs.index, ours.index) else None
