"""Loads, checks, exports, imports and keeps what a folder of forged adapters holds, and says how each ended.

Run in a process of its own, as `python -m tests.exchange.forged_patterns FOLDER`: what this guards against is a match
of `re`, which nothing can stop.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model

from tests.tuner.models import base_model, batch
from uniproj import AdapterError
from uniproj.bank import AdapterBank
from uniproj.exchange import export, import_adapter
from uniproj.exchange.verify import verify
from uniproj.format import patterns
from uniproj.tuner import UniProjConfig


def _logits(model: PeftModel) -> list[float]:
    with torch.no_grad():
        return model.eval()(**batch("llama")).logits.flatten().tolist()


def _loaded(folder: Path, again: Path) -> list[float]:
    model = PeftModel.from_pretrained(base_model("llama"), folder)
    model.save_pretrained(again)
    return _logits(model)


def _beside(folder: Path, own: Path) -> list[float]:
    model = PeftModel.from_pretrained(base_model("llama"), own)
    model.load_adapter(folder, "other")
    model.set_adapter("other")
    return _logits(model)


def _fresh(folder: Path) -> list[str]:
    config = UniProjConfig.from_pretrained(folder)
    return get_peft_model(base_model("llama"), config).base_model.targeted_module_names


def _in_bank(folder: Path, own: Path) -> list[str]:
    bank = AdapterBank.create(folder.parents[1] / "banks" / folder.name, own)
    bank.add("user", folder)
    return bank.names()


def _ended(act: Callable[[], object]) -> object:
    try:
        return act()
    except AdapterError as error:
        return f"refused: {error}"


def main(place: Path) -> dict[str, dict[str, object]]:
    """{forged adapter: {use: what came of it}}."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    patterns.SECONDS = 0.2
    own, base = place / "own", str(place / "base")
    ended = {}
    for folder in sorted((place / "forged").iterdir()):
        out = place / "out" / folder.name
        uses: dict[str, dict[str, Callable[[], object]]] = {
            "uniproj": {
                "from_pretrained": lambda f=folder, o=out: _loaded(f, o / "saved"),
                "load_adapter": lambda f=folder: _beside(f, own),
                "verify": lambda f=folder: verify(f, base) and "held",
                "export": lambda f=folder, o=out: export(f, o / "lora", base=base) or "written",
                "bank": lambda f=folder: _in_bank(f, own),
            },
            "old": {"from_pretrained": lambda f=folder, o=out: _loaded(f, o / "saved")},
            "template": {"get_peft_model": lambda f=folder: _fresh(f)},
            "lora": {"import": lambda f=folder, o=out: import_adapter(f, o / "ours")["lost_energy"]},
            "unilora": {"import": lambda f=folder, o=out: import_adapter(f, o / "ours", base=base)["lost_energy"]},
        }
        ended[folder.name] = {name: _ended(act) for name, act in uses[folder.name.split("-")[0]].items()}
    return ended


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
