"""Engines of other projects that ran an exported adapter: what results/engines has of each, and why others have not."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from tests.compatibility.subjects import Remark
from tests.engines.engine import ENGINES

RESULTS = Path(__file__).parents[2] / "results" / "engines"
capability = partial(pytest.mark.capability, "Engines")
ABSENT: dict[str, str] = {}


@capability("{engine}: SmolLM2-135M with an exported adapter")
@pytest.mark.parametrize("engine", [engine.label for engine in ENGINES.values()])
def test_ran(engine: str, remark: Remark) -> None:
    (named,) = (each for each in ENGINES.values() if each.label == engine)
    record = json.loads((RESULTS / f"{named.name}.json").read_text())
    pins = dict(each.split("==") for each in record["dependencies"] if "==" in each)
    # the record is of what the script asks for now
    assert list(named.dependencies) == record["dependencies"] and named.format == record["format"]
    assert all(version == pins.get(package, version) for package, version in record["versions"].items())
    users = record["users"].values()
    assert all(user["difference"] <= user["tolerance"] < user["effect"] / 4 for user in users)
    equal, tokens = (sum(user[key] for user in users) for key in ("tokens_equal", "tokens"))
    apart, tolerance = (max(user[key] for user in users) for key in ("difference", "tolerance"))
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    together = ", two adapters at once" if record["together"] else ""
    remark(
        f"ran, equal to PyTorch: {equal} of {tokens} tokens, log-probabilities within {apart:.1g} "
        f"(rounding allows {tolerance:.1g}){together}; {versions}"
    )


@capability("{engine}")
@pytest.mark.parametrize("engine", ABSENT)
def test_absent(engine: str) -> None:
    pytest.xfail(ABSENT[engine])
