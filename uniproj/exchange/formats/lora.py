"""A LoRA adapter as one theta_D: from a folder of PEFT's LORA and back into one, without the base model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from uniproj.errors import AdapterError
from uniproj.exchange import peft_folder
from uniproj.format.heads import entitled
from uniproj.format.patterns import of_modules, scale
from uniproj.layout import Block, LoRALayout

_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
# Variants of LoRA whose update is not s B A.
_REFUSED = ("use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens", "layer_replication")
# Starts of A and B for which PEFT changes the base weights too, on every loading.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoRAAdapter:
    """theta_D (D,) in the order of `layout`; scales: s of delta W = s B A by module; the configuration (PEFT's
    LoraConfig or one that extends it); other: what the file holds besides, such as a classification head, by PEFT's
    names."""

    layout: LoRALayout
    theta_D: Tensor
    scales: Mapping[str, float]
    config: LoraConfig
    other: Mapping[str, Tensor]


def read(folder: Path) -> LoRAAdapter:
    """The adapter in a folder of PEFT's LORA, theta_D in float64.

    Raises AdapterError for a missing folder, another PEFT type, DoRA and other variants, PiSSA and other starts for
    which PEFT changes the base weights, an alpha that is no number, factors of layers that are
    not linear, a factor without its pair, numbers that are not finite, and tensors to which the configuration does not
    entitle the folder.
    """
    config = peft_folder.read_config(folder, ("LORA",))
    if changed := [name for name in _REFUSED if getattr(config, name, None)]:
        raise AdapterError(f"{folder}: the update must be s B A, got {', '.join(changed)}. Take a plain LoRA.")
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
    for (module, r), (_, A) in zip(ranks(config, layout.modules).items(), layout.pairs(), strict=True):
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
    """A folder of PEFT's LORA in float32, one module after the other; theta_D is all that is held in memory.

    Without `rank`, A and B are the numbers of theta_D, at their ranks. With it, every module gets this rank by columns
    of B and rows of A that are 0, and the configuration one rank and one alpha, a whole number; where modules differ in
    s, or alpha would be no whole number, the rest of s goes into B, which is rounded once.

    Raises AdapterError for a rank below that of a module, and where the disk refuses; what was there before stays.
    """
    ranks = [a.shape[0] for _, a in adapter.layout.pairs()]
    if rank is not None and rank < max(ranks):
        raise AdapterError(f"export: rank must be at least that of every module, {max(ranks)}, got {rank}. Raise it.")
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
            more = (size - now for size, now in zip(reversed(shapes[_name(block)]), reversed(block.shape), strict=True))
            yield torch.nn.functional.pad(factor.float(), [n for size in more for n in (0, size)])
        yield from adapter.other.values()

    peft_folder.write(folder, config.to_dict(), index, tensors())


def lora_settings(config: LoraConfig) -> dict[str, Any]:
    """The fields of a configuration that LoraConfig takes too, without PEFT's type and its state of the moment."""
    names = {f.name for f in dataclasses.fields(LoraConfig) if f.init} - {"peft_type", "runtime_config"}
    return {name: getattr(config, name) for name in names}


def ranks(config: LoraConfig, modules: Iterable[str]) -> dict[str, int]:
    """The rank of every module, with the pattern that fits its name."""
    return of_modules("rank_pattern", config.rank_pattern, modules, config.r)


def scales(config: LoraConfig, layout: LoRALayout, rank: int | None = None) -> dict[str, float]:
    """PEFT's alpha / r, or alpha / sqrt(r), of every module, with the pattern that fits its name."""
    alphas = of_modules("alpha_pattern", config.alpha_pattern, layout.modules, config.lora_alpha)
    return {a.module: scale(alphas[a.module], rank or a.shape[0], config.use_rslora) for _, a in layout.pairs()}


def _config(adapter: LoRAAdapter, rank: int | None) -> LoraConfig:
    settings = lora_settings(adapter.config) | {"inference_mode": True}
    if rank is not None:
        first = next(iter(adapter.scales.values()))
        settings |= {"r": rank, "lora_alpha": max(1, round(first * rank))}
        settings |= {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    return LoraConfig(**settings)


def _name(block: Block) -> str:
    return f"base_model.model.{block.module}.lora_{block.factor}.weight"


def _shape(block: Block, rank: int | None) -> tuple[int, int]:
    rows, columns = block.shape
    return (rows, rank or columns) if block.factor == "B" else (rank or rows, columns)
