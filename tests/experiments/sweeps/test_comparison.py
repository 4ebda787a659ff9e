"""The table: ranked by score, silent about nothing."""

import math
from pathlib import Path

import pandas as pd
import pytest

from experiments import compare
from experiments.compare import committed
from experiments.files import read_json, write_json
from experiments.records.reading import load
from experiments.sweeps import comparison, launchers

ROOT = Path(__file__).parents[3]
ORIGIN = {"versions": {"python": "3.11"}, "commit": None, "hardware": {}, "finished": "2026-01-01T00:00:00+00:00"}


@pytest.fixture
def finished() -> pd.DataFrame:
    def run(projection: str, score: float, seed: int = 0, error: float | None = 0.0, stuck: str | None = None) -> dict:
        return {
            "model": "minilm", "task": "vader", "projection": projection, "metric": "accuracy", "score": score,
            "validation": score, "majority": 0.5, "rows": 1566, "lr": 0.01, "r": 4, "trained": 4740, "head": 770,
            "budget_error": error, "isometry_error": None, "step_ratio": 1.0, "step_ratio_low": 0.9,
            "step_ratio_high": 1.1, "adapter_bytes": 19272, "head_bytes": 3080, "train_seed": seed,
            "did_not_train": stuck,
        }  # fmt: skip

    return pd.DataFrame(
        [
            run("lora", 0.78, error=None),
            run("vera", 0.99, stuck="the loss went from 0.692 to 0.694"),
            run("unilora", 0.79),
            run("unilora", 0.81, seed=1),
            run("tied_lora", 0.75, error=0.05),
        ]
    )


def test_projections_are_ranked_by_their_mean_and_a_stuck_one_is_not(finished: pd.DataFrame) -> None:
    table = comparison.summarise(finished)
    assert list(table["projection"]) == ["unilora", "lora", "tied_lora", "vera"]
    assert list(table["ranked"]) == [True, True, True, False]
    assert table["score"][0] == pytest.approx(0.80) and table["score_sd"][0] == pytest.approx(0.02 / 2**0.5)


def test_one_method_with_two_options_has_two_rows_and_two_names(finished: pd.DataFrame) -> None:
    twins = finished[finished["projection"] == "unilora"].assign(projection="peft/fourierft", score=[0.4, 0.8])
    twins["hyperparameters"] = [{"n_frequency": 30, "scaling": 2}, {"n_frequency": 60, "scaling": 2}]
    lora = finished.head(1).assign(hyperparameters=[{}])
    table = comparison.summarise(pd.concat([lora, twins], ignore_index=True)).set_index("projection")
    assert table["score"].to_dict() == {
        "peft/fourierft (n_frequency=60)": 0.8, "lora": 0.78, "peft/fourierft (n_frequency=30)": 0.4,
    }  # fmt: skip
    # each of its own runs alone
    assert table["beats_majority"].to_list() == [True, True, False]


def test_the_text_says_what_the_numbers_hide(finished: pd.DataFrame) -> None:
    text = comparison.as_text(comparison.summarise(finished), finished, 4740)
    assert "80.0 [67.3, 92.7]" in text and "reference" in text and "not measured" in text
    assert "tied_lora cannot come nearer to the budget than +5.0%" in text
    assert "vera did not train (train_seed 0: the loss went from 0.692 to 0.694) and is not ranked" in text
    assert "1,566 test rows, majority class 50.0 %, 2 seed(s)" in text


def test_the_committed_rates_are_the_best_of_the_committed_record() -> None:
    record = read_json(ROOT / "results" / "compare-minilm-vader" / "tuning.json")
    common, trials = record["common"], pd.DataFrame(record["trials"])
    trained = trials[trials["did_not_train"].isna()].sort_values(["validation", "lr"], ascending=[False, True])
    best = trained.groupby("projection")["lr"].first().to_dict()
    sweep = committed()
    assert {case["projection"]: case["lr"] for case in sweep.cases} == best == record["best"]
    assert common["score_on"] == "validation" and min(trials.groupby("projection").size()) >= 4
    tuned_at = {key: common[key] for key in ("model", "task", "train_size", "epochs")}
    assert {key: sweep.settings[key] for key in tuned_at} == tuned_at
    assert set(trials["budget"].dropna()) == {sweep.settings["budget"]} and sweep.settings["r"] == 4


def test_automatic_rates_are_tuned_on_a_seed_that_is_not_reported(
    runs: Path, model: str, task: str, monkeypatch, capsys
) -> None:
    """The best of a made-up score, at 0.1, lies beyond the grid from 0.001 to 0.03."""

    def scored(folders: list[Path], *_: object) -> dict[Path, str]:
        for folder in folders:
            config = read_json(folder / "config.json")
            score = 0.9 - 0.1 * abs(math.log10(config["lr"]) + 1)
            made_up = dict.fromkeys(("rows", "head", "head_bytes", "trained", "adapter_bytes"), 8)
            times = dict.fromkeys(("step_ratio", "step_ratio_low", "step_ratio_high"), 1.0)
            result = {"config": config, "metric": "accuracy", "score": score, "did_not_train": None, "majority": 0.5}
            more = {"validation": score, "validation_best": score, "cost": {"seconds": 1.0}, "isometry_error": None}
            more |= {"budget_error": None, "provenance": ORIGIN, "higher_is_better": True}
            write_json(folder / "result.json", {**result, **made_up, **times, **more})
        return {}

    monkeypatch.setattr(launchers, "train_all", scored)
    asked = ["--model", model, "--task", task, "--projections", "lora", "unilora", "--budget", "200", "--lr", "auto"]
    assert compare.main([*asked, "--seeds", "0", "3", "--runs", str(runs)]) == 0
    records = load(runs)
    trials, reported = (records[records["score_on"] == split] for split in ("validation", "test"))
    assert set(trials["train_seed"]) == {4} and set(reported["train_seed"]) == {0, 3}
    assert set(trials["lr"]) == {0.001, 0.003, 0.01, 0.03, 0.1, 0.3} and set(reported["lr"]) == {0.1}
    (folder,) = runs.rglob("comparison-*")
    assert (folder / "choice.json").exists() and set(pd.read_csv(folder / "table.csv")["lr"]) == {0.1}
