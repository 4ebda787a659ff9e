"""d90 of curves that are known, its interval, and sentences for records that cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.intrinsic_dimension import crossing, d90, read
from analysis.intrinsic_dimension.__main__ import main
from experiments.errors import ExperimentError
from tests.sweeps import write, write_run


def _record(projection: str, trained: int, score: float, seed: int, **changes: Any) -> dict[str, Any]:
    seeds = {f"{kind}_seed": seed for kind in ("projection", "init", "data", "train")}
    settings = {"task": "glue/sst2", "model": "minilm", "data": "hub", "train_size": 800, "test_size": 100,
                "epochs": 3, "max_length": 64, "dtype": "float32", "base_dtype": "float32", "label_noise": 0.0,
                "score_on": "test"}  # fmt: skip
    outcome = {"metric": "accuracy", "score": score, "majority": 0.5, "trained": trained, "D": 10_000,
               "did_not_train": None, "folder": f"runs/{projection}-{trained}-{seed}"}  # fmt: skip
    return {**settings, "projection": projection, **seeds, **outcome, **changes}


def _sweep(noise: float = 0.0) -> list[dict[str, Any]]:
    """LoRA at 0.9; a method that gains 0.1 per decade from 0.6 at d = 10: 90 % of the gain, 0.86, at 10^3.6."""
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(5):
        rows.append(_record("lora", 10_000, 0.9 + noise * rng.normal(), seed))
        for decade in range(4):
            rows.append(_record("unilora", 10 ** (decade + 1), 0.6 + 0.1 * decade + noise * rng.normal(), seed))
    return rows


def test_crossings_are_linear_in_the_logarithm() -> None:
    sizes, scores = np.array([10.0, 100.0, 1000.0]), np.array([0.0, 0.5, 1.0])
    assert crossing(sizes, scores, 0.25) == pytest.approx(10**1.5)
    assert crossing(sizes, scores, 0.0) == 10.0
    assert crossing(sizes, scores, 1.1) == float("inf")


def test_d90_of_a_known_curve() -> None:
    rows = _sweep()
    for row in rows:
        row["score"] += 0.05 * (row["trained"] == 10_000 and row["projection"] == "unilora")
    found = d90(pd.DataFrame(rows)).set_index("projection").loc["unilora"]
    assert found["threshold"] == pytest.approx(0.86)
    # from 0.8 at 10^3 to 0.95 at 10^4
    assert found["d90"] == pytest.approx(10 ** (3 + 0.06 / 0.15))
    assert (found["low"], found["high"]) == pytest.approx((found["d90"], found["d90"]))


def test_noise_gives_an_interval_around_the_value() -> None:
    found = d90(pd.DataFrame(_sweep(noise=0.01))).set_index("projection").loc["unilora"]
    assert found["low"] < found["d90"]
    assert found["high"] is None or found["high"] > found["d90"]
    assert 0 < found["reached"] <= 1 and found["seeds"] == 5


def test_a_method_that_never_gets_there_has_no_d90() -> None:
    rows = [row for row in _sweep() if row["projection"] == "lora" or row["trained"] < 1000]
    found = d90(pd.DataFrame(rows)).set_index("projection").loc["unilora"]
    assert pd.isna(found["d90"]) and found["reached"] == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [r for r in rows if r["projection"] != "lora"], "LoRA itself must be among"),
        (lambda rows: [{**r, "score": None if i == 3 else r["score"]} for i, r in enumerate(rows)], "finite score"),
        (lambda rows: [{**r, "train_size": 800 + (i == 3)} for i, r in enumerate(rows)], "must share train_size"),
        (lambda rows: [{**r, "score_on": "validation"} for r in rows], "at least one run must be scored"),
        (lambda rows: [{**r, "did_not_train": "theta_d did not change"} for r in rows], "and have trained"),
    ],
)
def test_records_that_cannot_be_compared_are_a_sentence(change: Any, message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        d90(pd.DataFrame(change(_sweep())))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 64}, "must share batch_size, got 16, 64"),
        ({"dropout": 0.5}, "must share dropout, got 0.0, 0.5"),
        ({"r": 2, "D": 18432}, r"unilora, 32 must share D, got 36864, 18432"),
        ({"lr": 0.5}, r"unilora, 32 must share lr"),
    ],
)
def test_other_settings_do_not_count_as_seeds(change: dict[str, Any], message: str) -> None:
    committed = read(Path(__file__).parents[2] / "results" / "sweeps" / "score_against_d")
    # VeRA's size follows from its rank: other sizes may have other ranks
    assert committed[committed["projection"] == "vera"]["r"].nunique() > 1
    assert set(d90(committed)["seeds"]) == {5}
    again = committed[committed["projection"] == "unilora"].assign(**change)
    with pytest.raises(ExperimentError, match=message):
        d90(pd.concat([committed, again], ignore_index=True))


def test_the_command_reads_a_folder_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for row in _sweep(noise=0.01):
        write_run(tmp_path / "runs", {**row, "d": row["trained"]})
    assert main([str(tmp_path / "runs"), "--json", "--out", str(tmp_path / "out")]) == 0
    rows = json.loads(capsys.readouterr().out)["d90"]
    assert [row["projection"] for row in rows] == ["lora", "unilora"]
    assert (tmp_path / "out" / "intrinsic_dimension.png").stat().st_size > 10_000
    assert main([str(tmp_path / "nowhere")]) == 2


def test_an_exported_sweep_is_read_as_its_runs_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "failed": None, "adapter_sha256": row["folder"]} for row in _sweep(noise=0.01)]
    wanted = d90(pd.DataFrame(rows)).set_index("projection").loc["unilora"]
    lost = {**rows[1], "failed": "out of memory", "score": None, "folder": "runs/lost"}
    write(tmp_path / "mine", pd.DataFrame([*rows, lost]))
    assert main([str(tmp_path / "mine"), "--json", "--out", str(tmp_path / "out")]) == 0
    (found,) = [row for row in json.loads(capsys.readouterr().out)["d90"] if row["projection"] == "unilora"]
    assert (found["d90"], found["low"]) == pytest.approx((wanted["d90"], wanted["low"]))
