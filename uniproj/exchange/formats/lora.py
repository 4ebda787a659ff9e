"""Export and import of PEFT's LORA folders, which need no base model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor, nn

from uniproj.errors import AdapterError
from uniproj.exchange import peft_folder
from uniproj.exchange.adapter import Adapter, LoRAAdapter, lora_fields, scales
from uniproj.exchange.formats._peft import Attached, Pair, PeftMethod
from uniproj.exchange.registry import register
from uniproj.format.fields import Role, used
from uniproj.format.heads import entitled
from uniproj.format.patterns import of_modules
from uniproj.layout import Block, LoRALayout
from uniproj.projections.lora import LoRA

_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
# Values of init_lora_weights for which PEFT changes the base weights too, at every load.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@register("lora")
class LoRAFormat(PeftMethod):
    """A folder holds every A and B, so no base model is needed, and any projection can be written."""

    kind, config, accepts = "LORA", LoraConfig, LoRA
    takes_rank = True

    def build(self, theirs: Attached) -> LoRA:
        """The identity."""
        return LoRA(theirs.layout)

    def pairs(self, theirs: Attached, P: LoRA, theta_d: Tensor) -> Iterator[Pair]:
        """Every A and every B."""
        for block, ours in zip(P.layout.blocks, P.layout.split(theta_d), strict=True):
            factor = f"lora_{block.factor}"
            yield Pair(f"{block.module}.{factor}", theirs.tensor(block.module, factor).weight, ours)

    def write(self, adapter: Adapter, folder: Path, rank: int | None) -> None:
        """See `write` below."""
        write(adapter.lora(), folder, rank)

    def read(self, folder: Path, base: str | nn.Module | None, trust_remote_code: bool) -> LoRAAdapter:
        """See `read` below."""
        return read(folder)


def read(folder: Path) -> LoRAAdapter:
    """The adapter in a folder of PEFT's LORA, theta_D in float64.

    Raises AdapterError for a missing folder, another PEFT type, DoRA and other variants, tied embeddings, PiSSA and
    other starts for which PEFT changes the base weights, an alpha that is no number, factors of layers that are not
    linear, a factor without its pair, numbers that are not finite, and tensors that the configuration does not account
    for.
    """
    config = peft_folder.read_config(folder, "LORA")
    if changed := used(vars(config), Role.VARIANT):
        raise AdapterError(f"{folder}: the update must be s B A, got {', '.join(changed)}. Take a plain LoRA.")
    if config.ensure_weight_tying:
        raise AdapterError(
            f"{folder}: every module must have an A and a B of its own, got ensure_weight_tying=True, where the output "
            "embedding has the input's. Load it with PEFT's PeftModel.from_pretrained."
        )
    if str(config.init_lora_weights).startswith(_CHANGES_BASE):
        raise AdapterError(
            f"{folder}: the base weights must be those that were pretrained, got init_lora_weights = "
            f"{config.init_lora_weights!r}, for which PEFT changes them. Save it anew by PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it."
        )
    tensors = peft_folder.read_tensors(folder)
    found = {name: match for name in tensors if (match := _FACTOR.fullmatch(name))}
    if odd := [name for name in found if not tensors[name].is_floating_point()]:
        raise AdapterError(
            f"{folder}: {odd[0]} must hold real numbers, got {tensors[odd[0]].dtype}. Save it as float32."
        )
    factors = {(m["module"], m["factor"]): tensors[name].double() for name, m in found.items()}
    modules = {module for module, _ in factors}
    for module in modules:
        pair = [factors.get((module, factor)) for factor in "BA"]
        if any(x is None or x.ndim != 2 for x in pair) or pair[0].shape[1] != pair[1].shape[0]:  # type: ignore[union-attr]
            raise AdapterError(
                f"{folder}: {module} must have an A (r, in) and a B (out, r), got "
                f"{[None if x is None else tuple(x.shape) for x in pair]}. The file is truncated, or no linear layer's."
            )
    if not modules or any("lora_" in name for name in set(tensors) - set(found)):
        odd = sorted(name for name in set(tensors) - set(found) if "lora_" in name)[:1]
        raise AdapterError(f"{folder}: every factor must belong to a linear layer, got {odd or 'none'}. Leave it out.")
    shapes = {module: (factors[module, "B"].shape[0], factors[module, "A"].shape[1]) for module in modules}
    layout = LoRALayout.from_shapes(shapes, {module: factors[module, "A"].shape[0] for module in modules})
    ranks = of_modules("rank_pattern", config.rank_pattern, layout.modules, config.r)
    for (module, r), (_, A) in zip(ranks.items(), layout.pairs(), strict=True):
        if r != A.shape[0]:
            raise AdapterError(
                f"{folder}: the factors of {module} must have the rank of the configuration, {r!r}, got {A.shape[0]}. "
                "Correct r or rank_pattern."
            )
    theta_D = layout.flatten(factors)  # type: ignore[arg-type]
    other = {name: tensor for name, tensor in tensors.items() if name not in found}
    other = entitled(other, config.to_dict(), modules, str(folder))
    return LoRAAdapter(layout, theta_D, scales(config, layout), config, other)  # type: ignore[arg-type]


def write(adapter: LoRAAdapter, folder: Path, rank: int | None = None) -> None:
    """Write a folder of PEFT's LORA in float32, module by module: only theta_D is held in memory.

    Without `rank`, A and B are the numbers of theta_D, at their own ranks. With it, every module is padded to this rank
    by rows of A and columns of B that are 0, and the configuration has one rank and one integer alpha; where modules
    differ in s, or alpha would be no integer, the rest of s is multiplied into B, which is rounded once.

    Raises AdapterError for a rank below that of a module, and where the disk refuses; what was there before stays.
    """
    largest = max(a.shape[0] for _, a in adapter.layout.pairs())
    if rank is not None and rank < largest:
        raise AdapterError(f"export: rank must be at least that of every module, {largest}, got {rank}. Raise it.")
    config = _config(adapter, rank)
    written = scales(config, adapter.layout, rank)
    shapes = {_name(block): _shape(block, rank) for block in adapter.layout.blocks}
    index: dict[str, tuple[torch.dtype, Sequence[int]]] = {name: (torch.float32, shapes[name]) for name in shapes}
    index |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in adapter.other.items()}

    def tensors() -> Iterator[Tensor]:
        for block, factor in zip(adapter.layout.blocks, adapter.layout.split(adapter.theta_D), strict=True):
            rest = adapter.scales[block.module] / written[block.module]
            if block.factor == "B" and rest != 1.0:
                factor = factor.double() * rest
            (rows, columns), (now, across) = shapes[_name(block)], block.shape
            yield torch.nn.functional.pad(factor.float(), (0, columns - across, 0, rows - now))
        yield from adapter.other.values()

    peft_folder.write(folder, config.to_dict(), index, tensors())


def _config(adapter: LoRAAdapter, rank: int | None) -> LoraConfig:
    fields = lora_fields(adapter.config) | {"inference_mode": True}
    if rank is not None:
        first = next(iter(adapter.scales.values()))
        fields |= {"r": rank, "lora_alpha": max(1, round(first * rank))}
        fields |= {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    return LoraConfig(**fields)


def _name(block: Block) -> str:
    return f"base_model.model.{block.module}.lora_{block.factor}.weight"


def _shape(block: Block, rank: int | None) -> tuple[int, int]:
    rows, columns = block.shape
    return (rows, rank or columns) if block.factor == "B" else (rank or rows, columns)
