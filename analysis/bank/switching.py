"""What it costs to switch a model to another adapter: from banks of several sizes, and from PEFT's saved adapters."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter

from experiments.timing import of_turns, ratio_of_turns, take_turns
from uniproj.bank import AdapterBank

# switches between two looks at the clock
_REPEATED = 10


def measure(
    model: PeftModel, banks: Mapping[int, AdapterBank], peers: Mapping[str, tuple[PeftModel, Path]], rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """banks: by their count of adapters; peers: PEFT's models and a saved adapter of each.

    One row per alternative, in s per switch, and the ratios: of the largest bank to the smallest, and of the largest
    to each of PEFT's ways. A switch ends where the next forward pass can use the adapter.
    """
    chance = random.Random(0)

    def select(count: int, times: int) -> Callable[[], None]:
        last = 0

        def switch() -> None:
            nonlocal last
            for _ in range(times):
                # never the one that is in use, for which nothing is projected
                last = (last + 1 + chance.randrange(count - 1)) % count
                banks[count].select(model, f"user-{last}")

        return switch

    small, large = min(banks), max(banks)
    own = take_turns({f"bank of {n:,}": select(n, _REPEATED) for n in banks}, 4 * rounds, per=_REPEATED)
    largest = f"bank of {large:,}"
    ways: dict[str, Callable[[], object]] = {largest: select(large, 1)}
    for name, (peer, folder) in peers.items():
        ways[f"{name}: load_adapter and set_adapter"] = _load(peer, folder)
    lora, folder = peers["LoRA"]
    ways["LoRA: hotswap_adapter"] = lambda: hotswap_adapter(lora, str(folder), adapter_name="u0")
    beside = take_turns(ways, rounds)
    return {
        "seconds": [*of_turns(own), *of_turns({k: v for k, v in beside.items() if k != largest})],
        "ratios": [
            ratio_of_turns(own, largest, f"bank of {small:,}"),
            *(ratio_of_turns(beside, largest, name) for name in ways if name != largest),
        ],
    }


def _load(model: PeftModel, folder: Path) -> Callable[[], Callable[[], None]]:
    first = model.active_adapter

    def forget() -> None:
        model.set_adapter(first)
        model.delete_adapter("next")

    def load() -> Callable[[], None]:
        model.load_adapter(str(folder), "next")
        model.set_adapter("next")
        return forget

    return load
