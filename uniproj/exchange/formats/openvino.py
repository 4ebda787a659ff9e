"""LoRA as OpenVINO GenAI reads it.

Source: OpenVINO GenAI 2026.4, `src/cpp/src/lora/adapter.cpp`. `Adapter` takes one safetensors file, no configuration: a
layer adds alpha B A x with the alpha of the request's `AdapterConfig`, which is 1 where it names none, and nothing
divides it by r; `.alpha` tensors are read and left out. So s must be in B. Factors are PEFT's by name, of any rank, and
belong to every linear layer whose name contains theirs, where of several the first by alphabet is taken.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from peft import LoraConfig

from uniproj.errors import AdapterError
from uniproj.exchange.adapter import Adapter, lora_fields
from uniproj.exchange.formats import lora
from uniproj.exchange.formats._peft import refuse_all_but_linear
from uniproj.exchange.registry import Format, register


@register("openvino")
class OpenVINOFormat(Format):
    """Written, and read as any LoRA: alpha is r for PEFT too."""

    def write(self, adapter: Adapter, folder: Path, rank: int | None) -> None:
        """A LoRA folder in float32, every module at its own rank and with s = 1: what it was is multiplied into B,
        which is rounded once. OpenVINO takes the file with the tensors.

        Raises AdapterError for a head, a bias, added tokens or anything else that is trained besides A and B of linear
        layers, for replicated layers and for an aLoRA, for a module whose name is a part of another's, and where the
        disk refuses; what was there before stays.
        """
        refuse_all_but_linear(adapter, "OpenVINO")
        _refuse_names(sorted(site.name for site in adapter.layout.sites))
        found = adapter.lora()
        fields = lora_fields(found.config)
        fields |= {"lora_alpha": fields["r"], "alpha_pattern": dict(fields["rank_pattern"]), "use_rslora": False}
        lora.write(replace(found, config=LoraConfig(**fields)), folder)


def _refuse_names(names: list[str]) -> None:
    """Raises AdapterError where OpenVINO would give a module the factors of another."""
    for name in names:
        if other := next((other for other in names if name != other and name in other), None):
            raise AdapterError(
                f"export: OpenVINO finds the factors of {name} for {other} too, whose name contains it. Export to lora "
                "and merge it into the base model, or train the adapter on one of them."
            )
