"""Engines of other projects that ran an exported adapter: what results/engines has of each, and why others did not."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.compatibility.subjects import Remark
from tests.engines.engine import ENGINES, TALKING

RESULTS = Path(__file__).parents[2] / "results" / "engines"
capability = partial(pytest.mark.capability, "Engines")
ABSENT = {
    "Ollama": "not run: no package index has it; its ADAPTER takes the GGUF file that llama.cpp ran",
    "SGLang": "not run: its wheels need CUDA, and on a CPU its LoRA layers ask for pinned memory",
}


def _record(name: str) -> dict[str, Any]:
    """Of results/engines, of what the script asks for now."""
    engine, record = ENGINES[name], json.loads((RESULTS / f"{name}.json").read_text())
    pins = dict(re.fullmatch(r"([\w-]+)(?:\[\w+\])?==(.+)", each).groups() for each in engine.dependencies)
    assert record["dependencies"] == list(engine.dependencies) and record["format"] == engine.format
    assert record["versions"].keys() == {*engine.packages}
    assert all(pins[package] == version.partition("+")[0] for package, version in record["versions"].items())
    return record


def _versions(record: dict[str, Any]) -> str:
    return ", ".join(f"{package} {version}" for package, version in record["versions"].items())


# with what an engine multiplies, in a word: float32_mlx is MLX's float32
NAMES = {f"{engine.label}, {engine.precision.partition('_')[0]}": name for name, engine in TALKING.items()}


@capability("{engine}: SmolLM2-135M with an exported adapter")
@pytest.mark.parametrize("engine", NAMES)
def test_ran(engine: str, remark: Remark) -> None:
    record = _record(NAMES[engine])
    users = record["users"].values()
    assert len(users) == 2 and all(user["difference"] <= user["tolerance"] < user["effect"] / 2 for user in users)
    equal, tokens = (sum(user[key] for user in users) for key in ("tokens_equal", "tokens"))
    apart = max(user["difference"] for user in users)
    together = "; both adapters at once" if record["together"] else ""
    as_far = "equal to PyTorch" if equal == tokens else "as near to PyTorch as its rounding allows"
    remark(
        f"ran, {as_far}: {equal} of {tokens} tokens, log-probabilities within {apart:.1g}{together} "
        f"({_versions(record)})"
    )


@capability("diffusers: pipelines of a UNet and of a transformer with exported adapters")
def test_diffusers_ran(remark: Remark) -> None:
    record = _record("diffusers")
    measured = [found for users in record["models"].values() for found in users.values()]
    apart, effect = max(m["difference"] for m in measured), min(m["effect"] for m in measured)
    assert len(measured) == 6 and apart < 1e-3 * effect
    remark(
        f"ran, equal to PyTorch: within {apart:.1g} of the largest number; both adapters at once ({_versions(record)})"
    )


@capability("{engine}")
@pytest.mark.parametrize("engine", ABSENT)
def test_absent(engine: str) -> None:
    pytest.xfail(ABSENT[engine])
