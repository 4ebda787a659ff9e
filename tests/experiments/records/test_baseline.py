"""A cell at the majority class is marked; the rule against SciPy and numbers worked out by hand."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from experiments import tasks
from experiments.records import baseline
from experiments.sweeps import comparison
from experiments.tasks.task import constant, score

SEEDS = ("projection_seed", "init_seed", "data_seed", "train_seed")


def _runs(folder: Path, predictions: list[np.ndarray], labels: np.ndarray, metric: str = "accuracy") -> pd.DataFrame:
    """Finished runs of one cell with these predictions, one per seed."""
    found = []
    for seed, predicted in enumerate(predictions):
        place = folder / f"run-{seed}"
        place.mkdir(parents=True)
        rows = pd.DataFrame({"label": labels, "prediction": predicted})
        rows.to_csv(place / "predictions-last.csv", index=False)
        majority = score(metric, rows.assign(prediction=constant(metric, rows["label"])))
        record = {"cell": "a", "folder": str(place), "metric": metric, "score": score(metric, rows)}
        found.append({**record, "majority": majority, "did_not_train": None})
    return pd.DataFrame(found)


def _flipped(labels: np.ndarray, wrong: int) -> np.ndarray:
    return np.where(np.arange(len(labels)) < wrong, 1 - labels, labels)


@pytest.fixture
def labels() -> np.ndarray:
    """874 of 1000 rows are of class 0, as in a corpus of text messages."""
    return np.random.default_rng(1).permutation(np.repeat([0, 1], [874, 126]))


def test_always_the_majority_does_not_beat_it(labels, tmp_path: Path) -> None:
    runs = _runs(tmp_path, [np.zeros_like(labels)] * 3, labels)
    assert set(runs["score"]) == {0.874} == set(runs["majority"]) and baseline.beats(runs, "cell") == {"a": False}


def test_few_rows_above_the_majority_do_not_beat_it_and_many_do(labels, tmp_path: Path) -> None:
    """Three equal seeds have no spread: the interval over rows decides, here that of a binomial difference."""
    found = {}
    for gained in (3, 60):
        predicted = np.where(np.cumsum(labels) <= gained, labels, 0)  # so many rows of the rare class are found
        runs = _runs(tmp_path / str(gained), [predicted] * 3, labels)
        assert runs["score"].iloc[0] == pytest.approx(0.874 + gained / 1000)
        found[gained] = baseline.beats(runs, "cell")["a"]
        low = stats.binom(1000, gained / 1000).ppf(0.025) / 1000
        assert baseline._low_over_rows(runs) == pytest.approx(low, abs=0.004)
    assert found == {3: False, 60: True}  # one draw in twenty has none of three rows
    lost = np.where(np.cumsum(labels == 0) <= 5, 1, np.where(np.cumsum(labels) <= 8, labels, 0))
    runs = _runs(tmp_path / "lost", [lost] * 3, labels)  # eight rows gained and five lost
    assert runs["score"].iloc[0] > 0.874 and baseline.beats(runs, "cell") == {"a": False}


def test_seeds_that_disagree_do_not_beat_it(labels, tmp_path: Path) -> None:
    predictions = [_flipped(labels, wrong) for wrong in (10, 60, 200)]
    runs = _runs(tmp_path, predictions, labels)
    gaps = runs["score"] - runs["majority"]
    interval = stats.ttest_1samp(gaps, 0.0).confidence_interval(0.95)
    assert gaps.mean() > 0 > interval.low and baseline.beats(runs, "cell") == {"a": False}
    assert baseline.beats(runs.head(1), "cell") == {"a": True}  # one seed: its rows alone


def test_runs_that_failed_or_did_not_train_are_in_no_verdict(labels, tmp_path: Path) -> None:
    runs = _runs(tmp_path, [_flipped(labels, 10)] * 2, labels)
    stuck = _runs(tmp_path / "stuck", [np.zeros_like(labels)], labels).assign(did_not_train="theta_d did not change")
    assert baseline.beats(stuck, "cell") == {"a": False}
    assert baseline.beats(pd.concat([stuck, runs]), "cell") == {"a": True}  # of the runs that trained
    failed = pd.DataFrame([{"cell": "b", "failed": "out of memory"}])
    assert baseline.beats(failed, "cell") == {}
    assert baseline.beats(pd.concat([runs, failed], ignore_index=True), "cell") == {"a": True}


def test_the_best_single_answer_is_the_metrics_own(labels) -> None:
    series = pd.Series(labels)
    best = {metric: score(metric, pd.DataFrame({"label": labels, "prediction": constant(metric, series)})) for metric in
            ("accuracy", "F1", "macro F1", "Matthews")}  # fmt: skip
    assert best["accuracy"] == 0.874 and best["Matthews"] == 0.0
    # always 1 has precision 0.126 and recall 1; always 0 has no F1 of class 1
    assert best["F1"] == pytest.approx(2 * 0.126 / 1.126) == f1_score(labels, np.ones_like(labels))
    assert best["macro F1"] == pytest.approx(0.874 / 1.874) == f1_score(labels, np.zeros_like(labels), average="macro")


def test_the_table_of_a_sweep_prints_the_majority_and_marks_its_cells(swept: tuple[Path, Path]) -> None:
    folder = swept[1] / "sweeps" / "mine"
    text, summary = (folder / "tables.txt").read_text(), pd.read_csv(folder / "summary.csv")
    assert baseline.RULE in text and len(summary) == 2
    for cell in summary.itertuples():
        labels = tasks.get(cell.task).split("test")["label"]
        assert cell.majority == labels.value_counts(normalize=True).max()
        line = next(line for line in text.splitlines() if f" {cell.projection} " in line)
        assert f"{100 * cell.majority:.1f}" in line
        assert bool(cell.beats_majority) == (" *" not in line)
        assert cell.score > cell.majority or not cell.beats_majority


def test_the_table_of_a_comparison_marks_what_does_not_beat_the_majority(labels, tmp_path: Path) -> None:
    shown = {
        "model": "minilm", "task": "mail", "validation": 0.9, "rows": 1000, "lr": 0.01, "r": 4, "trained": 4740,
        "head": 770, "budget_error": 0.0, "isometry_error": None, "step_ratio": 1.0, "step_ratio_low": 0.9,
        "step_ratio_high": 1.1, "adapter_bytes": 19272, "head_bytes": 3080, **dict.fromkeys(SEEDS, 0),
    }  # fmt: skip
    stuck = _runs(tmp_path / "a", [np.zeros_like(labels)], labels).assign(projection="vera", **shown)
    good = _runs(tmp_path / "b", [_flipped(labels, 20)], labels).assign(projection="unilora", **shown)
    runs = pd.concat([stuck, good], ignore_index=True)
    lines = comparison.as_text(comparison.summarise(runs), runs, 4740).splitlines()
    vera, unilora = (next(line for line in lines if f" {name} " in line) for name in ("vera", "unilora"))
    assert "87.4 *" in vera and "98.0" in unilora and "*" not in unilora and baseline.RULE in lines
