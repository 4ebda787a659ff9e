"""Intervals and differences against SciPy and against numbers worked out by hand."""

import ast
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments.records import statistics
from experiments.records.statistics import bootstrap, cells, differences, paired, summary, t_interval
from tests.sweeps import made_up

SEEDS = ("projection_seed", "init_seed", "data_seed", "train_seed")


def _record(folder, projection: str, seed: int, right: list[int], **changes) -> dict:
    path = folder / f"{projection}-{seed}"
    path.mkdir()
    pd.DataFrame({"label": 1, "prediction": right}).to_csv(path / "predictions-last.csv", index=False)
    record = {
        "cell": projection,
        "cell.projection": projection,
        "projection": projection,
        "task": "vader",
        "data": "hub",
    }
    record |= {name: seed for name in SEEDS} | {"failed": None, "did_not_train": None, "folder": str(path)}
    score = float(np.mean(right)) if right else float("nan")
    return {
        **record,
        "score": score,
        "best": {"score": score},
        "metric": "accuracy",
        "lr": 0.1,
        "trained": 8,
        **changes,
    }


@pytest.fixture
def records(tmp_path) -> pd.DataFrame:
    return pd.DataFrame(
        [
            _record(tmp_path, "lora", 1, [1, 1, 1, 0]),
            _record(tmp_path, "lora", 2, [1, 1, 0, 0]),
            _record(tmp_path, "lora", 3, [1, 0, 0, 0]),
            _record(tmp_path, "unilora", 1, [1, 1, 1, 1]),
            _record(tmp_path, "unilora", 2, [1, 1, 1, 0]),
            _record(tmp_path, "unilora", 3, [1, 0, 0, 0]),
        ]
    )


def test_the_t_interval_is_scipys() -> None:
    values = np.array([0.1, 0.4, 0.2, 0.3])
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert t_interval(values) == pytest.approx((expected.low, expected.high))
    assert all(np.isnan(t_interval(np.array([0.1]))))
    # equal scores, such as those of runs that always answer the most frequent label
    assert t_interval(np.array([0.5, 0.5, 0.5])) == (0.5, 0.5)


def test_the_bootstrap_agrees_with_scipys_percentile_interval() -> None:
    values = np.random.default_rng(1).normal(size=40)
    low, high = bootstrap(values)
    reference = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=2).confidence_interval
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=0.04)
    assert all(np.isnan(bootstrap(values[:1])))


def test_differences_are_taken_seed_by_seed(records: pd.DataFrame) -> None:
    (row,) = paired(records, "lora").to_dict("records")
    assert row["pairs"] == 3 and row["difference"] == pytest.approx((0.25 + 0.25 + 0.0) / 3)
    expected = stats.ttest_rel([1.0, 0.75, 0.25], [0.75, 0.5, 0.25]).confidence_interval(0.95)
    assert (row["t_low"], row["t_high"]) == pytest.approx((expected.low, expected.high))
    assert row["seeds_low"] >= 0.0 and row["seeds_high"] == pytest.approx(0.25)
    assert row["rows_low"] == 0.0 and row["rows_high"] <= 0.5


def test_every_size_is_compared_with_the_references_largest(tmp_path) -> None:
    scores = {
        ("lora", 8): [1, 0, 0, 0],
        ("lora", 16): [1, 1, 0, 0],
        ("unilora", 2): [0, 0, 0, 0],
        ("unilora", 4): [1] * 4,
    }
    records = []
    for (projection, trained), right in scores.items():
        folder = tmp_path / str(trained)
        folder.mkdir()
        same = {"cell": f"{projection} {trained}", "trained": trained}
        records += [_record(folder, projection, seed, right, **same) for seed in (1, 2)]
    table = paired(pd.DataFrame(records), "lora").set_index("trained")
    assert list(table.index) == [2, 4] and list(table["pairs"]) == [2, 2]
    assert table["difference"].to_dict() == {2: -0.5, 4: 0.5}


def test_a_run_that_failed_or_did_not_train_is_shown_and_never_paired(records: pd.DataFrame) -> None:
    records.loc[3, "did_not_train"] = "theta_d did not change"
    records.loc[5, ["failed", "score", "best"]] = ["out of memory", float("nan"), None]
    (row,) = paired(records, "lora").to_dict("records")
    assert row["pairs"] == 1 and np.isnan(row["t_low"])
    table = summary(records).set_index("projection")
    assert table.loc["lora", "status"] == "complete" and table.loc["lora", "score"] == pytest.approx(0.5)
    own = table.loc["unilora"]
    assert (own["status"], own["runs"], own["seeds"], own["n"], own["did_not_train"]) == ("incomplete", 3, 2, 1, 1)
    # of 1.0 (did not train), 0.75 and a failure
    assert own["score"] == own["best_score"] == 0.75 and own["stuck"] == "train_seed 1: theta_d did not change"


def test_cells_that_are_the_same_runs_of_the_reference_count_once(records: pd.DataFrame) -> None:
    """A budget is nothing to LoRA: with two of them it has two cells of the same runs."""
    again = records[records["projection"] == "lora"].assign(cell="lora at another budget")
    (row,) = paired(pd.concat([records, again]), "lora").to_dict("records")
    (once,) = paired(records, "lora").to_dict("records")
    assert row == once and row["pairs"] == 3 and row["cell"] == "unilora"


@pytest.mark.parametrize("rate", ["lr", "weight_decay", "alpha"])
def test_rates_along_an_axis_are_compared_at_the_same_rate_and_tuned_ones_are_not(rate: str, tmp_path: Path) -> None:
    right = {
        ("lora", 0.1): [1, 1, 0, 0],
        ("lora", 0.2): [1, 0, 0, 0],
        ("unilora", 0.1): [1] * 4,
        ("unilora", 0.2): [0] * 4,
    }
    rows = []
    for (projection, value), answers in right.items():
        folder = tmp_path / str(value)
        folder.mkdir(exist_ok=True)
        same = {"cell": f"{projection} {value}", rate: value, f"cell.{rate}": value}
        rows += [_record(folder, projection, seed, answers, **same) for seed in (1, 2)]
    table = pd.DataFrame(rows)
    assert dict(differences(table, "lora").set_index(rate)["difference"]) == {0.1: 0.5, 0.2: -0.25}
    # a rate that was chosen for each is no setting in which they agree
    tuned = table[table["cell"].isin(["lora 0.1", "unilora 0.2"])].drop(columns=f"cell.{rate}")
    assert list(differences(tuned, "lora")["difference"]) == [-0.5]


def test_other_settings_of_a_sweep_keep_pairs_apart(records: pd.DataFrame) -> None:
    other = records.assign(dropout=0.5, **{"cell.dropout": 0.5, "cell": records["cell"] + " 0.5"}, score=0.0)
    both = pd.concat([records.assign(dropout=0.0, **{"cell.dropout": 0.0}), other])
    found = differences(both, "lora").set_index("dropout")["difference"]
    assert found[0.0] == pytest.approx(0.5 / 3) and found[0.5] == 0.0


def test_runs_that_did_not_train_are_in_no_mean_of_several_tasks_and_in_no_curve(records: pd.DataFrame) -> None:
    two = pd.concat([records, records.assign(task="other", folder=records["folder"] + "o")])
    two = two[two["projection"] == "lora"].reset_index(drop=True)
    two.loc[0, "did_not_train"] = "theta_d did not change"
    over = statistics.over_tasks(two)
    assert over["n"] == 2 and over["score"] == pytest.approx((0.5 + 0.25) / 2)
    logged = pd.DataFrame([{"folder": run, "step": 10, "loss": float(k)} for k, run in enumerate(two["folder"])])
    curves = statistics.mean_curves(cells(two), logged)
    assert dict(zip(curves["loss"], curves["n"], strict=True)) == {1.5: 2, 4.0: 3}


def test_lists_of_modules_pair(records: pd.DataFrame) -> None:
    asked = [["query"]] * len(records)
    listed = records.assign(target_modules=asked, **{"cell.target_modules": asked})
    (row,) = paired(listed, "lora").to_dict("records")
    assert row["pairs"] == 3 and row["target_modules"] == '["query"]'


def test_differences_to_a_reference_that_has_no_run_are_an_empty_table_with_each_column_once() -> None:
    found = differences(made_up(["glue/sst2"], ["unilora"]).assign(sweep="mine"), "lora")
    assert found.empty and found.columns.is_unique and {"row", "difference"} <= set(found)


ROOT = Path(__file__).parents[3]
# what makes a number of several records, and where the rest of these words is of something else
OF_RECORDS = {"mean", "std", "sem", "var", "median", "quantile", "percentile", "ppf", "interval", "bootstrap"}
OF_TIMES, OF_ROWS = "timing.py", "task.py"


def test_no_other_file_makes_a_number_of_several_records() -> None:
    found = []
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        if path.name not in ("statistics.py", OF_TIMES, OF_ROWS):
            calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
            names = {call.attr for call in calls if isinstance(call, ast.Attribute)} & OF_RECORDS
            found += [(path.name, name) for name in names]
    assert found == []
