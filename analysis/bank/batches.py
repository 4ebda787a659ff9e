"""What a token costs in a batch whose rows use adapters of different users: ours against PEFT's `adapter_names=`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from analysis.overhead.workloads import greedy
from experiments.timing import of_turns, ratio_of_turns, take_turns
from uniproj.bank import AdapterBank, mixed

# one token, so that every pass over the model decodes one token per row
PROMPT = 1


def measure(
    model: PeftModel, bank: AdapterBank, peer: PeftModel, users: list[str], new_tokens: int, rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Rows in s per decoded token of the whole batch (one row per user), and their ratios to PEFT's LoRA.

    Reading the users' vectors and projecting them counts as ours; peer holds one LoRA adapter per user in memory, under
    the same names. `base` is the model without any adapter, `one adapter` the same batch with one for all rows.
    """
    inputs = _prompt(len(users), model)

    def generate(each: PeftModel, **more: Any) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                each.generate(**inputs, **greedy(new_tokens), **more)

        return run

    def ours() -> None:
        with mixed(model, *bank.batch(users)):
            generate(model)()

    def bare() -> None:
        with model.disable_adapter():
            generate(model)()

    seconds = take_turns(
        {
            "bank: mixed": ours,
            "LoRA: adapter_names": generate(peer, adapter_names=users),
            "base": bare,
            "bank: one adapter": generate(model),
        },
        rounds,
        per=new_tokens,
    )
    return {
        "seconds": of_turns(seconds),
        "ratios": [ratio_of_turns(seconds, "LoRA: adapter_names", name) for name in ("bank: mixed", "base")],
    }


def mixes(peer: PeftModel) -> str:
    """What PEFT makes of a batch of which one row asks for the adapter and the other for the base."""
    inputs = _prompt(2, peer)
    with torch.no_grad():
        with_adapter = peer(**inputs).logits
        try:
            found = peer(**inputs, adapter_names=[peer.active_adapter, "__base__"]).logits
        except Exception as error:
            return f"refused: {type(error).__name__}: {error}"
    return "ignored: both rows have the adapter" if torch.equal(found, with_adapter) else "mixed"


def _prompt(rows: int, model: PeftModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (rows, PROMPT), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
