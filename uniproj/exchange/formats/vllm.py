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
from uniproj.exchange.formats import lora
from uniproj.exchange.formats.lora import LoRAAdapter

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def write(adapter: LoRAAdapter, folder: Path, rank: int | None = None) -> None:
    """A LoRA folder that vLLM takes, padded to `rank` or to the least rank of vLLM's that holds every module.

    Raises AdapterError for a rank that is not among vLLM's or too small, and for a head, a bias, added tokens or
    anything else that is trained besides A and B.
    """
    config = adapter.config
    besides = [name for name in ("modules_to_save", "trainable_token_indices") if getattr(config, name)]
    besides += [f"bias={config.bias!r}"] if config.bias != "none" else []
    besides += sorted(adapter.other)[:1] if adapter.other else []
    if besides:
        raise AdapterError(
            f"export: an adapter for vLLM must hold A and B alone, got {', '.join(besides)}. Export to lora and merge "
            "it into the base model, or train the adapter without."
        )
    largest = max(a.shape[0] for _, a in adapter.layout.pairs())
    fitting = [legal for legal in RANKS if legal >= largest]
    chosen = rank if rank is not None else next(iter(fitting), largest)
    if chosen not in fitting:
        raise AdapterError(
            f"export: rank must be one of vLLM's {', '.join(map(str, RANKS))} and at least {largest}, got {chosen}."
        )
    lora.write(adapter, folder, chosen)
