"""`python -m analysis.bank` on a tiny model: every part is measured, recorded and put into the table."""

import json
import math

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from analysis.bank.__main__ import main


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank")
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    few = {"--adapters": 30, "--users": 3, "--new-tokens": 2, "--rounds": 6, "--operations": 80, "--kills": 9}
    more = {"--d": 600, "--threads": 1, "--base": folder / "base", "--scratch": folder, "--out": folder / "out"}
    assert main([str(word) for pair in {**few, **more}.items() for word in pair]) == 0
    return folder / "out"


def test_every_part_is_recorded(out) -> None:
    bank, mixed, soak = (json.loads((out / f"{part}.json").read_text()) for part in ("bank", "mixed", "soak"))
    rows = {row["method"]: row for row in bank["storage"]}
    assert rows.keys() == {"bank", "LoRA", "UNILORA"} and rows["bank"]["adapters"] == 30
    assert rows["bank"]["bytes"] >= 30 * 4 * 600
    ratios = {row["ratio"]: row for row in bank["ratios"]}
    assert ratios.keys() == {
        "bank of 30 / bank of 10",
        "bank of 30 / LoRA: load_adapter and set_adapter",
        "bank of 30 / UNILORA: load_adapter and set_adapter",
        "bank of 30 / LoRA: hotswap_adapter",
    }
    assert {row["targets"] for row in mixed["ratios"]} == {"q, v", "all linear"}
    # PEFT 0.21 says nothing and gives every row the adapter
    assert mixed["adapter_names with UNILORA"].split(":")[0] in ("ignored", "refused")
    for row in [*ratios.values(), *mixed["ratios"]]:
        assert 0 < row["clock_low"] <= row["clock"] <= row["clock_high"] < math.inf
    assert soak["rows"][0]["operations"] >= 80
    for record in (bank, mixed, soak):
        assert record["provenance"]["hardware"]["cores"] and record["load_average"]["5 min"] >= 0


def test_the_table_holds_every_ratio(out) -> None:
    text = (out / "bank.md").read_text()
    assert "| bank of 30 / bank of 10 |" in text and "| LoRA: adapter_names / bank: mixed |" in text
    assert "## soak" in text and "UNILORA" in text


def test_bad_input_is_one_sentence(tmp_path, capsys) -> None:
    # more threads would slow every later test of this process
    assert main(["--parts", "mixed", "--base", "none.gguf", "--threads", "1", "--out", str(tmp_path)]) == 2
    assert "must be a GGUF file, got none" in capsys.readouterr().err
