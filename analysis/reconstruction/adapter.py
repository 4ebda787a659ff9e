"""A LoRA adapter as one theta_D: from a folder that PEFT wrote, without the base model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, load_peft_weights
from torch import Tensor

from uniproj import AdapterError, LoRALayout

_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
# Variants of LoRA whose update is not s B A.
_REFUSED = ("use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens", "layer_replication")


@dataclass(frozen=True)
class LoRAAdapter:
    """theta_D (D,) float64 in the order of `layout`; scales: alpha / r by module; the folder's configuration; other:
    what the file holds besides, such as a classification head, by PEFT's names."""

    layout: LoRALayout
    theta_D: Tensor
    scales: Mapping[str, float]
    config: LoraConfig
    other: Mapping[str, Tensor]


def read(folder: Path) -> LoRAAdapter:
    """The adapter in a folder of PEFT's LORA.

    Raises AdapterError for a missing folder, another PEFT type, DoRA and other variants, factors of layers that are
    not linear, a factor without its pair, and numbers that are not finite.
    """
    config = _config(folder)
    tensors = load_peft_weights(str(folder), device="cpu")
    found = {name: match for name in tensors if (match := _FACTOR.fullmatch(name))}
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
    theta_D = layout.flatten(factors)  # type: ignore[arg-type]
    if not torch.isfinite(theta_D).all():
        raise AdapterError(f"{folder}: all numbers must be finite, the file holds NaN or inf. Use another checkpoint.")
    scales = {b.module: _scale(config, b.module, a.shape[0]) for b, a in layout.pairs()}
    return LoRAAdapter(layout, theta_D, scales, config, {n: t for n, t in tensors.items() if n not in found})


def _config(folder: Path) -> LoraConfig:
    if not (folder / "adapter_config.json").is_file():
        raise AdapterError(f"{folder}: must be a folder with adapter_config.json, got none. Check the path.")
    config = PeftConfig.from_pretrained(str(folder))
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise AdapterError(f"{folder}: must hold an adapter of PEFT type LORA, got {config.peft_type}.")
    if changed := [name for name in _REFUSED if getattr(config, name, None)]:
        raise AdapterError(f"{folder}: the update must be s B A, got {', '.join(changed)}. Take a plain LoRA.")
    return config  # type: ignore[return-value]


def _scale(config: LoraConfig, module: str, r: int) -> float:
    """PEFT's alpha / r, or alpha / sqrt(r), with the pattern that fits the module's name."""
    patterns = config.alpha_pattern or {}
    fitting = [key for key in patterns if re.fullmatch(rf"(?:.*\.)?(?:{key})", module)]
    alpha = patterns[fitting[0]] if fitting else config.lora_alpha
    return alpha / (r**0.5 if config.use_rslora else r)
