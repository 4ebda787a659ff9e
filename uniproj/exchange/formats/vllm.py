"""LoRA under vLLM's rules.

Source: vLLM's documentation, v0.26, `vllm.config.lora`, `vllm.lora.peft_helper` and `vllm.lora.utils`. max_lora_rank is
one of nine ranks, and no adapter's r may exceed it. Of the configuration vLLM reads r, lora_alpha, target_modules,
bias, modules_to_save, use_rslora and use_dora; it knows no rank_pattern or alpha_pattern, so r and alpha must hold for
every module. A tensor is an A or a B of a linear layer, by PEFT's name; any other is refused. Which modules have a LoRA
layer the server alone knows.
"""

from __future__ import annotations

from pathlib import Path

from uniproj.errors import AdapterError
from uniproj.exchange.adapter import Adapter
from uniproj.exchange.formats import lora
from uniproj.exchange.formats._peft import refuse_all_but_linear
from uniproj.exchange.registry import Format, register

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@register("vllm")
class VLLMFormat(Format):
    """Written, and read as any LoRA."""

    takes_rank = True

    def write(self, adapter: Adapter, folder: Path, rank: int | None) -> None:
        """A LoRA folder that vLLM takes, padded to `rank` or to the least rank of vLLM's that holds every module.

        Raises AdapterError for a rank that is not among vLLM's or too small, and for a head, a bias, added tokens or
        anything else that is trained besides A and B, for replicated layers and for an aLoRA.
        """
        refuse_all_but_linear(adapter, "vLLM")
        largest = max(site.r for site in adapter.layout.sites)
        fitting = [legal for legal in _RANKS if legal >= largest]
        chosen = rank if rank is not None else next(iter(fitting), largest)
        if chosen not in fitting:
            raise AdapterError(
                f"export: rank must be one of vLLM's {', '.join(map(str, _RANKS))} and at least {largest}, "
                f"got {chosen}."
            )
        lora.write(adapter.lora(), folder, chosen)
