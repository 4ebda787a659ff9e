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
from uniproj.exchange.formats._peft import refuse_other_kinds
from uniproj.exchange.registry import Format, register
from uniproj.format.fields import Role, used

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
        config = vars(adapter.config)
        besides = [f"{name}={config[name]!r}" for name in used(config, Role.BESIDE)] + sorted(adapter.other)[:1]
        if besides:
            raise AdapterError(
                f"export: an adapter for vLLM must hold A and B alone, got {', '.join(besides)}. Export to lora and "
                "merge it into the base model, or train the adapter without."
            )
        refuse_other_kinds(adapter, "vLLM")
        for name in ("layer_replication", "alora_invocation_tokens"):
            if config[name]:
                raise AdapterError(f"export: vLLM has no {name}, got {config[name]}. Export to lora.")
        largest = max(site.r for site in adapter.layout.sites)
        fitting = [legal for legal in _RANKS if legal >= largest]
        chosen = rank if rank is not None else next(iter(fitting), largest)
        if chosen not in fitting:
            raise AdapterError(
                f"export: rank must be one of vLLM's {', '.join(map(str, _RANKS))} and at least {largest}, "
                f"got {chosen}."
            )
        lora.write(adapter.lora(), folder, chosen)
