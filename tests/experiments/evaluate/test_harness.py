"""Finished runs under lm-evaluation-harness's own tasks."""

import gc
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lm_eval
import numpy as np
import pandas as pd
import pytest
import torch
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import AutoModelForCausalLM, BertForSequenceClassification

from experiments import harness, train
from experiments.errors import ExperimentError
from experiments.evaluate.finished import load_base, load_finished
from experiments.evaluate.harness import BEFORE, FILE, _samples, evaluate, forgetting
from experiments.records.reading import load
from experiments.runs.config import RunConfig
from experiments.runs.folder import RESULT, prepare
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


def _found(scores: dict, samples: dict | None = None, limit: int | None = None) -> dict:
    return {"scores": scores, "samples": samples or {}, "rows": 4, "shots": 0, "limit": limit}


def test_forgetting_pairs_the_rows_where_both_hold_them(tmp_path: Path) -> None:
    """Differences 0, -1, 1, 1: mean 1/4, sd sqrt(11/12), over 2 for four rows. Without rows: a 3-4-5 triangle."""
    after = {"a": _found({"acc,none": 0.75, "acc_stderr,none": 0.25}, {"acc,none": [1.0, 0.0, 1.0, 1.0]}),
             "b": _found({"acc,none": 0.5, "acc_stderr,none": 0.03})}  # fmt: skip
    before = {"a": _found({"acc,none": 0.5, "acc_stderr,none": 0.29}, {"acc,none": [1.0, 1.0, 0.0, 0.0]}),
              "b": _found({"acc,none": 0.7, "acc_stderr,none": 0.04}), "c": _found({"acc,none": 0.1})}  # fmt: skip
    a, b = (row for _, row in forgetting(tmp_path, after, before).iterrows())
    assert (a["before"], a["after"], a["change"], a["paired"]) == (0.5, 0.75, 0.25, 4)
    assert a["standard error"] == pytest.approx((11 / 12) ** 0.5 / 2)
    assert (b["task"], b["change"], b["paired"]) == ("b", pytest.approx(-0.2), 0)
    assert b["standard error"] == pytest.approx(0.05)
    assert forgetting(tmp_path, after, {"a": before["a"] | {"limit": 10}}).empty


def test_rows_are_kept_of_scores_that_are_their_mean() -> None:
    logged = [
        {"filter": "none", "acc": 1.0, "inst": [True, False], "ppl": (2.0, 3), "strict": np.True_},
        {"filter": "none", "acc": 0.0, "inst": [True], "ppl": (1.0, 2), "strict": np.False_},
        {"filter": "other", "acc": 1.0},
    ]
    scores = {"acc,none": 0.5, "acc_stderr,none": 0.5, "acc,other": 0.2, "inst,none": 2 / 3, "ppl,none": 4.0}
    scores["strict,none"] = 0.5
    assert _samples(logged, scores) == {"acc,none": [1.0, 0.0], "strict,none": [1.0, 0.0]}


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is loaded and asked, by a harness that answers at once."""
    asked: list[tuple[str, str]] = []

    def evaluate(run: tuple[str, str], name: str, limit: int | None) -> dict:
        asked.append((*run, name))
        return _found({"acc,none": 0.5}, limit=limit)

    monkeypatch.setattr("experiments.evaluate.harness._manager", lambda: SimpleNamespace(task_index=CODE))
    monkeypatch.setattr("experiments.evaluate.harness.evaluate", evaluate)
    for what in ("finished", "base"):
        load = partial(lambda what, folder, caller: (what, folder.name), what)
        monkeypatch.setattr(f"experiments.evaluate.harness.load_{what}", load)
    return asked


CODE = {"humaneval": SimpleNamespace(cfg={"unsafe_code": True}), "gsm8k": SimpleNamespace(cfg={})}


def test_runs_of_one_base_have_it_scored_once(tmp_path: Path, answered: list, capsys) -> None:
    base = {"task": "gsm8k", "data": "hub", "model": "m", "revision": None, "base_dtype": "float32"}
    folders = [tmp_path / name for name in ("one", "two", "three")]
    for folder, quantization in zip(folders, (None, None, "nf4"), strict=True):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**base, "quantization": quantization}))
    words = [*map(str, folders), "--tasks", "gsm8k", "--before"]
    assert harness.main(words) == 0
    assert [one for one in answered if one[0] == "base"] == [("base", "one", "gsm8k"), ("base", "three", "gsm8k")]
    assert sum(one[0] == "finished" for one in answered) == 3 and "change" in capsys.readouterr().out
    assert all("gsm8k" in json.loads((folder / BEFORE).read_text()) for folder in folders)
    assert harness.main(words) == 0 and len(answered) == 5  # what is there is not evaluated again


def test_code_is_not_run_unless_it_is_allowed(tmp_path: Path, answered: list, monkeypatch, capsys) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    words = [str(tmp_path), "--tasks", "gsm8k,humaneval"]
    assert harness.main(words) == 2 and answered == []
    assert "harness: humaneval: programs that a model wrote are executed" in capsys.readouterr().err
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    assert harness.main(words) == 0 and len(answered) == 2
    # what the harness itself says of the task
    folder = Path(lm_eval.__file__).parent / "tasks" / "humaneval"
    assert load_yaml(folder / "humaneval_instruct.yaml", resolve_func=False)["unsafe_code"] is True


@pytest.mark.system
def test_the_base_is_what_it_was_before_training(solver: Path, tmp_path: Path, llama: str, capsys) -> None:
    folder = Path(shutil.copytree(solver, tmp_path / solver.name))
    assert harness.main([str(folder), "--limit", "2", "--before"]) == 0
    found = json.loads((folder / BEFORE).read_text())["gsm8k"]
    assert found["rows"] == 2 and len(found["samples"]["exact_match,flexible-extract"]) == 2
    assert "change" in capsys.readouterr().out
    row = {"input_ids": torch.tensor([[1, 2, 3]])}
    base = AutoModelForCausalLM.from_pretrained(llama, trust_remote_code=False)
    with torch.inference_mode():
        bare, before, after = (
            model.eval()(**row).logits
            for model in (base, load_base(folder, "test").model, load_finished(folder, "test").model)
        )
    assert torch.equal(bare, before) and not torch.equal(bare, after)


def test_a_base_is_loaded_alone(config: RunConfig, runs: Path) -> None:
    """Without the model that the run trained, which is as large."""
    folder = prepare(runs, config.to_json())
    found = {"config": config.to_json(), "metric": "accuracy", "score": 0.5, "did_not_train": None}
    (folder / RESULT).write_text(json.dumps(found))

    def models() -> list[BertForSequenceClassification]:
        gc.collect()
        return [found for found in gc.get_objects() if type(found) is BertForSequenceClassification]

    before = len(models())
    base = load_base(folder, "test")
    assert len(models()) == before + 1 and base.model in models()


@pytest.mark.system
def test_a_group_has_the_rows_of_its_tasks(solver: Path, monkeypatch) -> None:
    """Two tasks of made-up rows, weighted by size: 1 of 2 and 3 of 4 rows are right."""
    results = {"both": {"acc,none": 4 / 6, "acc_stderr,none": 0.2, "sample_len": 6, "alias": "both"}}
    samples = {"x": [1.0, 0.0], "y": [1.0, 1.0, 0.0, 1.0]}
    logged = {name: [{"filter": "none", "acc": one} for one in values] for name, values in samples.items()}
    answer = {"results": results, "samples": logged, "n-shot": {}, "versions": {"both": 2}}
    monkeypatch.setattr("lm_eval.simple_evaluate", lambda *_, **__: answer)
    run = load_finished(solver, "test")
    found = evaluate(run, "both")
    assert found["rows"] == 6 and found["samples"]["acc,none"] == [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    with pytest.raises(ExperimentError, match=r"'tag' must have a score of its own, got a name for x, y\. Name these"):
        evaluate(run, "tag")
