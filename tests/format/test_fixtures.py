"""What an earlier version saved loads bit-equal now."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from tests.format.fixtures import (
    EXPECTED,
    MANIFEST,
    ON_KINDS,
    ROOT,
    WITH_HEAD,
    base,
    digests,
    kinds,
    numbers,
    place,
    wanted,
)
from uniproj.format import file
from uniproj.tuner import adapter_of

FOLDERS = sorted(path.parent for path in ROOT.glob("v*/*/adapter_config.json"))


def test_the_fixtures_only_grow() -> None:
    noted, found = json.loads(MANIFEST.read_text()), digests()
    assert {path: found.get(path) for path in noted} == noted
    assert found.keys() == noted.keys(), "run python -m tests.format.fixtures and commit"
    assert {ROOT / place(name) for name in wanted()} <= {*FOLDERS}, (
        "a projection without a fixture: run python -m tests.format.fixtures and commit"
    )


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_a_fixture_loads_bit_equal(folder: Path) -> None:
    model = PeftModel.from_pretrained(kinds() if folder.name == ON_KINDS else base(), folder)
    now, then = numbers(model), load_file(folder / EXPECTED)
    assert now.keys() == then.keys()
    theta_D, expected = now.pop("theta_D"), then.pop("theta_D")
    assert all(torch.equal(now[name], then[name]) for name in then)
    P = adapter_of(model).P
    if P.sparse and not P.sums_products and not P.learned:
        assert torch.equal(theta_D, expected)
    else:  # sums, whose last bit is the matrix product's of the day
        torch.testing.assert_close(theta_D, expected, rtol=1e-5, atol=1e-7)
    assert {m.scaling["default"] for m in model.modules() if isinstance(m, LoraLayer)} == {2.0}
    if folder.name == WITH_HEAD:
        head = load_file(folder / file.WEIGHTS)["base_model.model.lm_head.weight"]
        assert torch.equal(model.base_model.model.lm_head.modules_to_save["default"].weight, head)
