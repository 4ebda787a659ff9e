"""What the docs say of speed and room is what the committed records say."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "results" / "bank"


def _record(part: str) -> dict[str, Any]:
    return json.loads((RECORDS / f"{part}.json").read_text())


def test_room_and_opening() -> None:
    (ours,) = (row for row in _record("bank")["storage"] if row["method"] == "bank")
    assert ours["adapters"] == 10_000 and ours["bytes"] > 10_000 * 23_040 * 4
    assert max(ours["ratio_to_numbers"], ours["ratio_after_replacing_2_percent"]) <= 1.05
    assert ours["open_and_get_most_seconds"] < 1


def test_switching() -> None:
    ratios = {row["ratio"]: row["processor"] for row in _record("bank")["ratios"]}
    assert ratios["bank of 10,000 / bank of 10"] <= 1.1
    assert all(value <= 0.5 for name, value in ratios.items() if "LoRA" in name) and len(ratios) == 4


def test_mixed_batches_of_all_linear_layers() -> None:
    record = _record("mixed")
    ratios = {(row["targets"], row["ratio"]): row["processor"] for row in record["ratios"]}
    assert record["settings"]["users"] == 16 and record["settings"]["base"] == "smollm2"
    assert ratios["all linear", "LoRA: adapter_names / bank: mixed"] >= 2


def test_the_soak() -> None:
    (row,) = _record("soak")["rows"]
    assert row["operations"] >= 100_000 and row["processes"] == 4 and row["kills"] > 20
    assert row["read_blocked_most_seconds"] < 1


def test_many_users_in_vllm() -> None:
    record = json.loads((ROOT / "results" / "engines" / "many_users.json").read_text())
    ways = {"bank.mixed": "`mixed`", "vLLM": "vLLM", "PEFT: adapter_names": "PEFT: `adapter_names`"}
    assert record["users"] == 100 and record["tokens_equal"] == dict.fromkeys(list(ways)[1:], record["tokens"])
    ratios = {row["ratio"]: row for row in record["ratios"]}
    text = (ROOT / "docs" / "bank.md").read_text()
    for row in record["seconds"]:
        to = ratios.get(f"{row['way']} / bank.mixed")
        ratio = f"{to['clock']:.2f} ({to['clock_low']:.2f} to {to['clock_high']:.2f})" if to else ""
        said = [ways[row["way"]], f"{row['seconds']:.1f}", f"{row['tokens_per_second']:.0f}", ratio]
        assert "|" + "|".join(f" {cell} " if cell else " " for cell in said) + "|" in text
