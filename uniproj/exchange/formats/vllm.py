"""LoRA under vLLM's rules.

Source: vLLM 0.32, `vllm.config.lora`, `vllm.lora.peft_helper`, `vllm.lora.lora_model` and `vllm.lora.utils`.
max_lora_rank of a server is one of nine ranks, and no adapter's r may exceed it. Of the configuration vLLM reads r,
lora_alpha, use_rslora and, unlike 0.26, the patterns of both; older ones read it too where r and alpha hold for every
module. It refuses bias, use_dora, layer_replication, alora_invocation_tokens, starts that change the base, and heads
other than `score` and `classifier`. A tensor is an A or a B by PEFT's name. Which modules have a LoRA layer the server
alone knows: it refuses an adapter by the last part of a module's name.
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
