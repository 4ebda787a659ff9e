"""Engines of other projects that ran an exported adapter: what results/engines has of each, and why others have not."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.compatibility.subjects import Remark
from tests.engines.engine import ENGINES, TALKING, Engine

RESULTS = Path(__file__).parents[2] / "results" / "engines"
capability = partial(pytest.mark.capability, "Engines")
ABSENT: dict[str, str] = {
    "SGLang": "not run: its wheels (0.5.23) need CUDA, and on a CPU its LoRA layers ask for pinned memory, which "
    "PyTorch has for accelerators alone (sgl-project/sglang issue 31894); the tests read the folder by its rules",
}


@capability("{engine}: SmolLM2-135M with an exported adapter")
@pytest.mark.parametrize("engine", [engine.label for engine in TALKING.values()])
def test_ran(engine: str, remark: Remark) -> None:
    (named,) = (each for each in TALKING.values() if each.label == engine)
    record, versions = _record(named)
    users = record["users"].values()
    assert all(user["difference"] <= user["tolerance"] < user["effect"] / 4 for user in users)
    equal, tokens = (sum(user[key] for user in users) for key in ("tokens_equal", "tokens"))
    apart, tolerance = (max(user[key] for user in users) for key in ("difference", "tolerance"))
    together = ", two adapters at once" if record["together"] else ""
    remark(
        f"ran, equal to PyTorch: {equal} of {tokens} tokens, log-probabilities within {apart:.1g} "
        f"(rounding allows {tolerance:.1g}){together}; {versions}"
    )


@capability("diffusers: images of Stable Diffusion and of Flux with an exported adapter")
def test_diffusers_ran(remark: Remark) -> None:
    record, versions = _record(ENGINES["diffusers"])
    measured = [each for of_users in record["models"].values() for each in of_users.values()]
    apart, effect = max(each["difference"] for each in measured), min(each["effect"] for each in measured)
    assert apart < 1e-3 * effect
    remark(
        f"ran, equal to PyTorch: the latents of small pipelines are within {apart:.1g} of the largest, which the "
        f"adapters move by {effect:.1g} or more, two adapters at once; {versions}"
    )


def _record(engine: Engine) -> tuple[dict[str, Any], str]:
    """What was measured, which is of what the script asks for now, and the versions."""
    record = json.loads((RESULTS / f"{engine.name}.json").read_text())
    pins = dict(each.split("==") for each in record["dependencies"] if "==" in each)
    assert list(engine.dependencies) == record["dependencies"] and engine.format == record["format"]
    assert all(version == pins.get(package, version) for package, version in record["versions"].items())
    return record, ", ".join(f"{package} {version}" for package, version in record["versions"].items())


@capability("{engine}")
@pytest.mark.parametrize("engine", ABSENT)
def test_absent(engine: str) -> None:
    pytest.xfail(ABSENT[engine])
