"""What a token costs in a batch whose rows use adapters of different users: ours against PEFT's `adapter_names=`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from analysis.bank import models, storage
from analysis.overhead.workloads import greedy
from experiments.timing import now, of_turns, ratio_of_turns, take_turns
from uniproj.bank import AdapterBank, mixed

# one token, so that every pass over the model decodes one token per row
PROMPT = 1
_MIXED, _LORA = "bank: mixed", "LoRA: adapter_names"


# PEFT takes longer for each adapter the more there are: 256 of them on all linear layers of 28 blocks take minutes
_MOST_BESIDE = 64


def measure(
    shape: models.Shape, count: int, new_tokens: int, rounds: int, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """`_measure` for `count` users on bases of this shape, with a bank in `folder`; beyond 64 users without PEFT's."""
    users = [f"user-{k}" for k in range(count)]
    model = models.ours(shape)
    bank = AdapterBank.create(folder, model)
    storage.fill(bank, count)
    peer = models.lora(shape, users) if count <= _MOST_BESIDE else None
    found = _measure(model, bank, peer, users, new_tokens, rounds)
    return {key: [{"targets": shape.targets, "users": count, **row} for row in rows] for key, rows in found.items()}


def _measure(
    model: PeftModel, bank: AdapterBank, peer: PeftModel | None, users: Sequence[str], new_tokens: int, rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Rows in s per decoded token of the whole batch (one row per user), and their ratios.

    Reading the users' vectors and projecting them counts as ours; peer holds one LoRA adapter per user in memory, under
    the same names. `base` is the model without any adapter, `one adapter` the same batch with one for all rows.
    """
    inputs = _prompt(len(users), model)

    def generate(each: PeftModel, **more: Any) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                each.generate(**inputs, **greedy(new_tokens), **more)
            now(each.device)

        return run

    def ours() -> None:
        with mixed(model, *bank.batch(users)):
            generate(model)()

    def bare() -> None:
        with model.disable_adapter():
            generate(model)()

    ways = {_MIXED: ours, "base": bare, "bank: one adapter": generate(model)}
    pairs = [(_MIXED, "base")]
    if peer is not None:
        ways[_LORA] = generate(peer, adapter_names=list(users))
        pairs = [(_LORA, _MIXED), (_LORA, "base"), *pairs]
    seconds = take_turns(ways, rounds, per=new_tokens)
    return {"seconds": of_turns(seconds), "ratios": [ratio_of_turns(seconds, *pair) for pair in pairs]}


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
    ids = torch.randint(0, model.config.vocab_size, (rows, PROMPT), generator=generator).to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
