"""The table of goals says of hand-made rows what their numbers say."""

from pathlib import Path
from typing import Any

from analysis.overhead import report
from analysis.overhead.goals import goals


def _kernel(method: str, **numbers: Any) -> dict[str, Any]:
    return {"case": "Llama-2-7B r=4", "family": "unilora", "D": 9_994_240, "method": method, **numbers}


def _ratio(key: str, value: float, low: float, high: float) -> dict[str, float]:
    return {key: value, f"{key}_low": low, f"{key}_high": high}


def test_kernels() -> None:
    rows = [
        _kernel("unilora", **_ratio("both_per_copy", 9.0, 7.5, 9.5)),
        _kernel("PEFT UNILORA", **_ratio("both_per_ours", 11.0, 10.5, 12.0)),
        _kernel("x[idx]", **_ratio("both_per_ours", 0.9, 0.8, 0.95)),
        _kernel("fastfood", bytes_per_coordinate=4.5) | {"family": "fastfood"},
        _kernel("huge", note="skipped: needs about 900 GB"),
        # of a measurement that failed, whose methods are not known
        *({"case": "Llama-2-7B r=4", "family": family, "note": "failed: no memory"} for family in ("unilora", "other")),
    ]
    found = {goal["what"]: (goal["value"], goal["goal"], goal["reached"]) for goal in goals(rows, [])}
    assert found == {
        "D = 9,994,240: time of the fastest competitor, x[idx], over uniproj's": (0.9, ">= 1", "no"),
        "D = 9,994,240: PEFT UNILORA over uniproj": (11.0, ">= 10", "yes"),
        "D = 9,994,240: forward and adjoint over a copy": (9.0, "<= 8", "no, within the interval"),
        "D = 9,994,240: fastfood's state, bytes per coordinate": (4.5, "<= 5", "yes"),
    }


def test_models() -> None:
    rows = [
        {"base": "smollm2", "method": "PEFT LORA", **_ratio("inference_ratio", 1.0, 0.99, 1.02)},
        {
            "base": "smollm2", "method": "fastfood",
            **_ratio("step_ratio", 1.01, 1.0, 1.015), **_ratio("inference_ratio", 1.05, 1.04, 1.06),
            "peak_bytes_per_coordinate_beyond_lora": 42.0,
        },
        {"base": "minilm", "method": "vblora", **_ratio("step_ratio", 1.5, 1.4, 1.6)},
        {"base": "smollm2", "method": "vblora", "note": "failed: no memory"},
    ]  # fmt: skip
    found = {goal["what"]: (goal["value"], goal["goal"], goal["reached"]) for goal in goals([], rows)}
    assert found["fastfood: step over LoRA's"] == (1.01, "<= 1.02", "yes")
    assert found["fastfood: token over LoRA's, PEFT LORA beside itself up to"] == (1.05, "<= 1.02", "no")
    assert found["fastfood: peak beyond LoRA's, bytes per coordinate"] == (42.0, "<= 8", "no")
    assert found["vblora: step over LoRA's"] == (None, "<= 1.02", "not measured")


def test_a_gpu_is_not_held_to_the_goals_of_the_cpu(tmp_path: Path) -> None:
    for device, count in {"cpu": 1, "cuda": 0}.items():
        provenance = {
            "hardware": {"device": device, "cores": 1, "threads": 1},
            "versions": {},
            "commit": "",
            "finished": "",
        }
        rows = [_kernel("unilora", both_per_copy=9.0, both_per_copy_low=8.5, both_per_copy_high=9.5)]
        record = {"config": {"part": "kernel", "device": device}, "rows": rows, "provenance": provenance}
        found, page = report.write(tmp_path, [record])
        assert len(found["goals"]) == count and ("## Goals" in page) == bool(count)
