"""LoRA under SGLang's rules.

Source: SGLang 0.5.23, `sglang.srt.lora.lora` (`LoRAAdapter`), `lora_config`, `lora_manager` and `utils`. Of the
configuration SGLang reads r, lora_alpha, target_modules and use_dora: it knows no rank_pattern, no alpha_pattern and no
use_rslora, and infers its own modules from a list of names alone. A tensor belongs to `layers.N.` of its name, or to
lm_head; others get no sentence. q, k and v become one module, and so do gate and up, and q_a and kv_a of DeepSeek: k
and up may be missing. A missing q or v stops the reader, as do the zeros that it puts for a kv_a, of the shape of q_a;
an up without its gate and a kv_a without its q_a are skipped with a warning, and so are w1, w2 and w3, which get other
names than the target modules have.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from peft import LoraConfig

from uniproj.errors import AdapterError
from uniproj.exchange.adapter import Adapter, lora_fields
from uniproj.exchange.formats import lora
from uniproj.exchange.formats._peft import refuse_all_but_linear
from uniproj.exchange.registry import Format, register

_KNOWN = re.compile(r".*layers\.\d+\..+(?<!\.w[123])|(.+\.)?lm_head")
# what SGLang makes one module of: the names, and those of them that may not be missing
_STACKS = (
    (("q_proj", "k_proj", "v_proj"), ("q_proj", "v_proj")),
    (("gate_proj", "up_proj"), ("gate_proj",)),
    (("q_a_proj", "kv_a_proj_with_mqa"), ("q_a_proj", "kv_a_proj_with_mqa")),
)


@register("sglang")
class SGLangFormat(Format):
    """Written, and read as any LoRA."""

    def write(self, adapter: Adapter, folder: Path, rank: int | None) -> None:
        """A LoRA folder that SGLang takes, padded to the largest rank, with every module by its name.

        Raises AdapterError for anything that is trained besides A and B of linear layers, for replicated layers, for an
        aLoRA, for a module that SGLang passes over, and for a part of a stack without the parts that it needs.
        """
        refuse_all_but_linear(adapter, "SGLang")
        names = [site.name for site in adapter.layout.sites]
        if other := [name for name in names if not _KNOWN.fullmatch(name)]:
            raise AdapterError(
                "export: modules for SGLang must lie in layers.N or be lm_head, as it passes over others, and over w1, "
                f"w2 and w3, got {other[0]}. Leave it out of target_modules, or export to lora and merge it into the "
                "base model."
            )
        _check_stacks(names)
        fields = lora_fields(adapter.config) | {"target_modules": names}
        fields |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        largest = max(site.r for site in adapter.layout.sites)
        lora.write(replace(adapter.lora(), config=LoraConfig(**fields)), folder, largest)


def _check_stacks(names: list[str]) -> None:
    known = set(names)
    for name in names:
        parent, _, last = name.rpartition(".")
        for parts, needed in _STACKS:
            lacking = [part for part in needed if last in parts and f"{parent}.{part}" not in known]
            if lacking:
                raise AdapterError(
                    f"export: SGLang makes one module of {', '.join(parts)}, and needs {' and '.join(needed)} of it, "
                    f"got {name} without {lacking[0]}. Train these together, or export to vllm."
                )
