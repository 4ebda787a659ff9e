"""Finished runs under lm-evaluation-harness's own tasks."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from experiments import harness, train
from experiments.evaluate.harness import FILE
from experiments.records.reading import load
from experiments.runs.folder import prepare
from experiments.runs.resolve import resolve
from uniproj import plugins

# prompts of IFEval whose checks a text of letters can pass or fail
FIRST, ROWS = 60, 10


def _folder(shared_data: str, place: Path) -> str:
    for name, rows in (("alpaca/train", 20), ("gsm8k/train", 60), ("gsm8k/test", 8)):
        source = "alpaca_small/train" if name == "alpaca/train" else name
        _write(pd.read_json(f"{shared_data}/{source}.jsonl", lines=True, nrows=rows), place / f"{name}.jsonl")
    prompts = pd.read_json(f"{shared_data}/ifeval/test.jsonl", lines=True)
    _write(prompts.iloc[FIRST : FIRST + ROWS], place / "ifeval" / "test.jsonl")
    return str(place)


def _write(rows: pd.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_json(path, orient="records", lines=True)


def _finished(task: str, model: str, data: str, runs: Path, **settings: object) -> Path:
    small = {"d": 64, "lr": 0.05, "epochs": 1, "train_size": 8, "validation_size": 2, "max_length": 96, "batch_size": 8}
    config = resolve(
        {"task": task, "model": model, "data": data, "projection": "unilora", "seed": 0, **small, **settings}
    )
    folder = prepare(runs, config.to_json())
    assert train.main([str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def solver(tmp_path_factory, llama: str, shared_data: str) -> Path:
    """A finished run on GSM8K; a test that writes into it takes a copy."""
    data = _folder(shared_data, tmp_path_factory.mktemp("data"))
    return _finished("gsm8k", llama, data, tmp_path_factory.mktemp("runs"), test_size=2, max_new_tokens=4)


@pytest.mark.system
def test_ifeval_scores_what_the_run_scored(runs: Path, tmp_path: Path, llama: str, shared_data: str) -> None:
    """The same greedy texts of up to 1,280 tokens, the harness's limit, judged by two ways."""
    folder = _finished("alpaca", llama, _folder(shared_data, tmp_path), runs, max_new_tokens=1280)
    assert harness.main([str(folder)]) == 0
    found = json.loads((folder / FILE).read_text())["ifeval"]
    own = load(folder)["score"].iloc[0]
    assert found["rows"] == ROWS and 0 < own < 1
    assert found["scores"]["prompt_level_strict_acc,none"] == pytest.approx(own)


@pytest.mark.system
def test_gsm8k_is_asked_once(solver: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    folder = Path(shutil.copytree(solver, tmp_path / solver.name))
    assert harness.main([str(folder), "--limit", "2"]) == 0
    found = json.loads((folder / FILE).read_text())
    assert list(found) == ["gsm8k"] and found["gsm8k"]["rows"] == 2 and found["gsm8k"]["shots"] == 5
    assert {key.partition(",")[2] for key in found["gsm8k"]["scores"]} == {"strict-match", "flexible-extract"}
    monkeypatch.setattr("experiments.evaluate.harness.evaluate", None)  # what is there is not evaluated again
    capsys.readouterr()
    assert harness.main([str(folder), "--limit", "2"]) == 0
    assert "flexible-extract" in capsys.readouterr().out


def test_a_task_of_ones_own_needs_tasks_by_name(tmp_path: Path, monkeypatch, capsys) -> None:
    own = SimpleNamespace(task=SimpleNamespace(harness={}), config=SimpleNamespace(task="my_reviews"))
    monkeypatch.setattr("experiments.evaluate.harness.load_finished", lambda *_: own)
    assert harness.main([str(tmp_path)]) == 2
    caught = capsys.readouterr()
    assert "got my_reviews. Name the tasks" in caught.err and "--tasks gsm8k" in caught.err and caught.out == ""
    with pytest.raises(SystemExit):
        harness.main([str(tmp_path), "--limit", "0"])
    monkeypatch.setattr("experiments.evaluate.harness.load_finished", lambda *_: plugins.load(["gone.py"]))
    assert harness.main([str(tmp_path)]) == 2 and "gone.py must be a Python file" in capsys.readouterr().err


@pytest.mark.system
def test_what_cannot_be_scored_is_said(tmp_path: Path, runs: Path, solver: Path, config, capsys) -> None:
    assert harness.main([str(tmp_path)]) == 2
    assert "finished run" in capsys.readouterr().err
    for unknown in ("no_such_task", "hellaswag"):  # the second one's rows lie on a hub out of reach
        assert harness.main([str(solver), "--tasks", unknown]) == 2
        assert f"'{unknown}' must be a task of lm-evaluation-harness" in capsys.readouterr().err
    assert not (solver / FILE).exists()
    encoder = prepare(runs, config.to_json())
    assert train.main([str(encoder)]) == 0
    assert harness.main([str(encoder), "--tasks", "gsm8k"]) == 2
    assert "causal model" in capsys.readouterr().err
