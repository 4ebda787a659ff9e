"""Damaged records are a sentence, a gap is named, and a call that fails writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import uniproj
from paper_figures import comparison
from paper_figures.__main__ import main
from paper_figures.committed import Committed
from paper_figures.figures import fastfood
from paper_figures.figures.paper_scores import COMPARISONS
from paper_figures.report.__main__ import main as report
from tests.sweeps import made_up
from tests.sweeps import write as write_sweep

METHODS = ["lora", "unilora", "fastfood", "fastfood_sign"]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """One made-up sweep over d, and the costs of four methods on one base."""
    write_sweep(tmp_path / "sweeps" / "score_against_d", made_up(["glue/sst2"], METHODS))
    (tmp_path / "overhead").mkdir()
    cost = {"base": "minilm", "D": 36864, "trained": 4740, "step_ratio": 1.1, "step_ratio_low": 1.0,
            "step_ratio_high": 1.2, "step_pairs": 9, "peak_bytes": 1e9, "file_bytes": 1e4,
            "peak_bytes_per_coordinate_beyond_lora": 2.0}  # fmt: skip
    table = pd.DataFrame([{"method": name, **cost} for name in METHODS])
    table.to_csv(tmp_path / "overhead" / "overhead-model.csv", index=False)
    return tmp_path


def _without(name: str, column: str) -> Callable[[Path], None]:
    def change(results: Path) -> None:
        pd.read_csv(results / name).drop(columns=column).to_csv(results / name, index=False)

    return change


def _written(name: str, text: str) -> Callable[[Path], object]:
    return lambda results: (results / "sweeps/score_against_d" / name).write_text(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_written("records.csv", ""), "records.csv must be a table, got No columns"),
        (_written("curves.csv", "a\n1\n"), "curves.csv must have the columns ['folder', 'loss', 'step']"),
        (_written("provenance.json", "{}"), "provenance.json must hold ['adapters', 'commits'"),
        (_written("choice.json", "{}"), "choice.json must hold the trials"),
        (_written("choice.json", '{"choices": [{"trials": [1]}]}'), "choice.json must hold the trials"),
        (_without("sweeps/score_against_d/records.csv", "trained"), "must have the columns ['trained']"),
    ],
)
def test_damaged_records_are_a_sentence(change: Callable, message: str, results: Path, capsys) -> None:
    change(results)
    for command in (main, report):
        arguments = ["--results", str(results), "--only", "score_against_d"] if command is main else [str(results)]
        assert command([*arguments, "--out", str(results / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not (results / "out").exists()


@pytest.mark.parametrize(("column", "value"), [("score", "good"), ("score", 99.0), ("metric", "kappa")])
def test_one_damaged_run_is_shown_as_that_and_in_no_figure(
    column: str, value: object, results: Path, capsys, monkeypatch
) -> None:
    """A page of all that is there names it; what is drawn for a paper is made of whole records alone."""
    monkeypatch.setattr(uniproj, "names", lambda: ["lora"])
    path = results / "sweeps/score_against_d/records.csv"
    table = pd.read_csv(path).astype({column: object})
    table.loc[1, column] = value
    table.to_csv(path, index=False)
    said = f"the score of every run must be a finite number that {value if column == 'metric' else 'accuracy'} can have"
    assert main(["--results", str(results), "--only", "score_against_d", "--out", str(results / "out")]) == 2
    assert f"{said}, got" in capsys.readouterr().err and not (results / "out").exists()
    assert report([str(results), "--out", str(results / "page.html")]) == 0
    page = (results / "page.html").read_text()
    assert '"kind":"damaged"' in page and said in page and page.count('"status":"incomplete"') == 1
    assert page.count('"status":"complete"') == len(METHODS) - 1


@pytest.mark.parametrize(
    ("name", "column", "product"),
    [
        ("overhead/overhead-model.csv", "peak_bytes_per_coordinate_beyond_lora", "fastfood"),
        ("overhead/overhead-model.csv", "step_ratio_low", "training_cost"),
        ("sweeps/score_against_d/records.csv", "adapter_bytes", "score_against_bytes"),
        ("sweeps/score_against_d/records.csv", "train_size", "score_against_rows"),
    ],
)
def test_a_missing_column_is_a_sentence(name: str, column: str, product: str, results: Path, capsys) -> None:
    _without(name, column)(results)
    if product == "score_against_rows":
        (results / "sweeps" / "score_against_d").rename(results / "sweeps" / product)
    # what is made before writes nothing either
    only = ["--only", "instruction", product]
    assert main(["--results", str(results), "--out", str(results / "out"), *only]) == 2
    assert column in capsys.readouterr().err and not (results / "out").exists()


def test_a_method_whose_cost_was_not_measured_is_named(results: Path) -> None:
    path = results / "overhead" / "overhead-model.csv"
    table = pd.read_csv(path)
    other = table[table["method"] != "fastfood"].assign(base="smollm2")
    pd.concat([table, other]).to_csv(path, index=False)
    (found, _) = fastfood.make(Committed(results))
    rows = {row[1]: row[-4:] for row in found.rows if row[0] == "ours"}
    assert (
        rows["Fastfood"] == ["1.10 [1.00, 1.20]", "2", "not run", "not run"]
        and rows["Uni-LoRA"] == ["1.10 [1.00, 1.20]", "2"] * 2
    )


def test_some_products_leave_the_table_of_all_as_it_is(results: Path) -> None:
    (results / "out").mkdir()
    (results / "out" / "tables.md").write_text("every table")
    assert main(["--results", str(results), "--out", str(results / "out"), "--only", "instruction"]) == 0
    assert (results / "out" / "tables.md").read_text() == "every table"
    assert (results / "out" / "instruction.md").exists()


def test_the_average_of_glue_is_taken_seed_by_seed(results: Path) -> None:
    spec = next(spec for spec in COMPARISONS if spec.name == "glue_base")
    table = made_up([f"glue/{task}" for task in ("sst2", "mrpc", "cola", "qnli", "rte", "stsb")], ["lora", "unilora"])

    def average() -> str:
        write_sweep(results / "sweeps" / "glue_base", table)
        rows = comparison.rows(spec, Committed(results))
        (row,) = [row for row in rows if row.block == "ours, RoBERTa-base" and row.projection == "unilora"]
        return row.scores["average"].text

    own = table[table["projection"] == "unilora"].groupby("train_seed")["score"].mean().to_numpy()
    assert len(own) == 3
    half = 4.302653 * own.std(ddof=1) / np.sqrt(3)
    assert (
        average()
        == f"{100 * own.mean():.1f} [{100 * (own.mean() - half):.1f}, {100 * (own.mean() + half):.1f}] (n = 3)"
    )
    table.loc[(table["task"] == "glue/rte") & (table["train_seed"] == 1), "failed"] = "out of memory"
    assert average() == "failed"
    table = table[table["task"] != "glue/rte"]
    assert average() == "not run"
