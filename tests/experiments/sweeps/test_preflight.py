"""What a sweep or a comparison could not finish is said before anything is trained, also by a dry run."""

import json
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from transformers import SqueezeBertConfig

from experiments import compare, harness, sweep, train
from experiments.errors import ExperimentError
from experiments.files import read_json, write_json
from experiments.runs import entrants
from experiments.runs.config import RunConfig
from experiments.runs.folder import CONFIG, LOSSES, RESULT, prepare
from experiments.runs.resolve import resolve
from experiments.sweeps import launchers, preflight
from tests.format.test_patterns import HANGS_BOTH, HANGS_RE


@pytest.fixture
def folder(tmp_path: Path, task: str) -> Path:
    """Own data that are in order, to be spoilt."""
    return Path(shutil.copytree(task, tmp_path / "mine"))


def _change(folder: Path, split: str, column: str, value: object, row: int = 0) -> None:
    path = folder / f"{split}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[row][column] = value
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))


def _rename(folder: Path, split: str, old: str, new: str) -> None:
    path = folder / f"{split}.jsonl"
    pd.read_json(path, lines=True).rename(columns={old: new}).to_json(path, orient="records", lines=True)


SPOILT = {
    "no test": (lambda f: (f / "test.jsonl").unlink(), "must hold test as one of .jsonl, .tsv, .parquet, .csv"),
    "no train": (lambda f: (f / "train.jsonl").unlink(), "must hold train as one of"),
    "empty test": (lambda f: (f / "test.jsonl").write_text(""), "test.jsonl must hold rows, got none: it is empty"),
    "empty validation": (lambda f: (f / "validation.jsonl").write_text("\n"), "validation.jsonl must hold rows"),
    "broken test": (lambda f: (f / "test.jsonl").write_text("{"), "test.jsonl must be valid jsonl, got: line 1"),
    "text label": (lambda f: _change(f, "test", "label", "good", 3), "test: labels must .* got 'good' in row 4"),
    "null label": (lambda f: _change(f, "test", "label", None, 5), "missing values .* the first in row 6"),
    "NaN label": (lambda f: _change(f, "validation", "label", float("nan")), "missing values .* the first in row 1"),
    "unseen in test": (lambda f: _change(f, "test", "label", 7, 2), r"test: labels must occur .* got 7 in row 3"),
    "unseen between": (lambda f: _change(f, "train", "label", 3), None),
    "unseen in validation": (lambda f: _change(f, "validation", "label", 2), "validation: labels must occur in the"),
    "no text": (lambda f: _change(f, "test", "text", None), "test: every row must have text and label"),
    "two texts": (
        lambda f: _change(f, "test", "text", ["a", "b"]),
        r"test: text must be text, got \['a', 'b'\] in row 1",
    ),
    "name of text": (lambda f: _rename(f, "test", "text", "review"), "test: the columns must hold one of"),
    "name of label": (lambda f: _rename(f, "test", "label", "target"), "test: a column 'label' must exist"),
}


@pytest.mark.parametrize("spoilt", [name for name, (_, message) in SPOILT.items() if message])
def test_own_data_that_a_run_would_fail_on(
    spoilt: str, folder: Path, file: Path, model: str, runs: Path, capsys
) -> None:
    spoil, message = SPOILT[spoilt]
    spoil(folder)
    own = [f"settings.task={folder}"]
    commands = [
        lambda: sweep.main([str(file), *own, "--dry-run", "--runs", str(runs)]),
        lambda: sweep.main([str(file), *own, "--runs", str(runs)]),
        lambda: compare.main(["--model", model, "--task", str(folder), "--lr", "auto", "--runs", str(runs)]),
    ]
    # one way leads to the check from everywhere
    for command in commands if spoilt == "no test" else commands[:1]:
        assert command() == 2
        said = capsys.readouterr().err
        assert re.search(message, said), said
        assert not runs.exists()


def test_target_modules_that_re_would_not_end_on(file: Path, runs: Path, capsys) -> None:
    content = yaml.safe_load(file.read_text())
    signal.alarm(300)  # ends these tests where `re` is asked
    try:
        for pattern, status in (rf"{HANGS_RE}|.*\.(query|value)", 0), (HANGS_BOTH, 2):
            content["settings"]["target_modules"] = pattern
            file.write_text(yaml.safe_dump(content))
            assert sweep.main([str(file), "--dry-run", "--runs", str(runs)]) == status, pattern
            said = capsys.readouterr().err
            assert ("target_modules: all patterns must be matched within" in said) == (status == 2), said
    finally:
        signal.alarm(0)


def test_grouped_convolutions_part_the_rank_among_their_groups(task: str, tmp_path: Path) -> None:
    """Of a convolution from 32 to 32 channels in 4 groups PEFT makes A (4, 32) and B (32, 1) at r = 4."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "embedding_size": 32, "num_hidden_layers": 1}
    SqueezeBertConfig(**sizes, num_attention_heads=4, intermediate_size=48).save_pretrained(tmp_path)
    D = 2 * (4 * 32 + 32 * 1)
    settings = {
        "task": task,
        "model": str(tmp_path),
        "target_modules": ["query", "value"],
        "seed": 0,
        "lr": 0.1,
        "r": 4,
    }
    assert resolve({**settings, "projection": "unilora", "budget": 10**4}).d == D
    config = resolve({**settings, "projection": "unilora", "budget": D - 20})
    entrants.get(config.projection).check(config)
    with pytest.raises(ExperimentError, match=rf"d must be at most D = {D} .* got {D + 1}"):
        entrants.get(config.projection).check(replace(config, d=D + 1))
    runs = (config, resolve({**settings, "projection": "lora"}))
    counts = [entrants.get(run.projection).count(run) for run in runs]
    assert counts == [D - 20, D]


def test_rows_in_order_are_counted_with_their_classes(folder: Path, file: Path, runs: Path, capsys) -> None:
    SPOILT["unseen between"][0](folder)  # a third class, which only train has
    assert sweep.main([str(file), f"settings.task={folder}", "--dry-run", "--runs", str(runs)]) == 0
    labels = pd.read_json(folder / "test.jsonl", lines=True)["label"]
    most = 100 * labels.value_counts().max() / len(labels)
    line = f"96 / 32 / 48 rows (train, validation, test), 3 classes: 0, 1, 3, accuracy of the majority {most:.1f}"
    assert line in capsys.readouterr().out and not runs.exists()


PLUGIN = """
from uniproj import Projection, register
from uniproj.budget import Budget
from uniproj.projections.unilora import UniLoRA


@register("refusing_{name}")
class Refusing(UniLoRA):
{body}
"""
REFUSING = {
    "budget": (
        "    @classmethod\n    def for_budget(cls, shapes, budget, r):\n        return {}['no budget']",
        "refusing_budget must say what it trains at a budget of 200, got KeyError",
    ),
    "nothing": (
        "    @classmethod\n    def for_budget(cls, shapes, budget, r):\n        return None",
        "refusing_nothing must say what it trains at a budget of 200, got AttributeError",
    ),
    "half": (
        "    @classmethod\n    def for_budget(cls, shapes, budget, r):\n        return Budget(r=r, d=12.5, trained=12)",
        "refusing_half.for_budget: d must be an integer or null, got 12.5",
    ),
    "made": (
        "    def __init__(self, layout, d, seed=0):\n        raise RuntimeError('not today')",
        r"refusing_made must work on .* at r = 4, d = 200, got RuntimeError\('not today'\)",
    ),
    "seed": (
        "    def __init__(self, layout, d, seed=0):\n        super().__init__(layout, d, seed)\n        1 / (2 - seed)",
        "refusing_seed must work on .* got ZeroDivisionError",
    ),
    "applied": (
        "    def _matvec(self, theta_d):\n        return theta_d.no_such_attribute",
        "refusing_applied must work on .* got AttributeError",
    ),
    "shape": (
        "    def _rmatvec(self, theta_D):\n        return theta_D[:, :3]",
        "refusing_shape must work on .* got RuntimeError",
    ),
}


@pytest.mark.parametrize("name", REFUSING)
def test_a_projection_that_refuses(name: str, file: Path, tmp_path: Path, runs: Path, capsys) -> None:
    body, message = REFUSING[name]
    (tmp_path / "plugin.py").write_text(PLUGIN.format(name=name, body=body))
    own = [f"+settings.plugins=[{tmp_path / 'plugin.py'}]", f"axes.projection=[lora,refusing_{name}]"]
    for more in (["--dry-run"], []):
        assert sweep.main([str(file), *own, *more, "--runs", str(runs)]) == 2
        said = capsys.readouterr().err
        assert re.search(message, said), said
        assert not runs.exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["axes.projection=[unilora]", "+settings.hyperparameters={assignment:dealt}"],
            "assignment must be 'balanced'",
        ),
        (["axes.projection=[lora_xs]", "~settings.budget", "+settings.r=500"], "lora_xs: "),
        (["+settings.metric=Pearson"], "the metric of classes must be one of F1, Matthews, accuracy, macro F1"),
        (["+settings.metric=kappa"], "metric must be one of accuracy, F1, macro F1, Matthews, Pearson, Spearman"),
    ],
)
def test_settings_that_only_a_run_would_notice(overrides, message: str, file: Path, runs: Path, capsys) -> None:
    assert sweep.main([str(file), *overrides, "--dry-run", "--runs", str(runs)]) == 2
    assert message in capsys.readouterr().err and not runs.exists()


def test_a_single_run_reads_the_rows_it_is_scored_on_before_it_trains(
    folder: Path, model: str, runs: Path, capsys
) -> None:
    (folder / "test.jsonl").unlink()
    settings = {"task": str(folder), "model": model, "projection": "unilora", "d": 8, "seed": 0, "lr": 0.1}
    place = prepare(runs, resolve(settings).to_json())
    assert train.main([str(place)]) == 1
    assert "failed: tasks:" in capsys.readouterr().out and not (place / LOSSES).exists()
    # a trial has no use for it
    trial = prepare(runs, resolve({**settings, "score_on": "validation", "epochs": 0.2}).to_json())
    assert train.main([str(trial)]) == 0


def test_a_comparison_ranks_by_a_metric_that_its_task_has(model: str, task: str, runs: Path, capsys) -> None:
    asked = ["--model", model, "--task", task, "--projections", "unilora", "--budget", "200", "--lr", "0.02"]
    assert compare.main([*asked, "--metric", "Spearman", "--runs", str(runs)]) == 2
    assert "the metric of classes must be one of" in capsys.readouterr().err and not runs.exists()
    for more, metric in (([], None), (["--metric", "macro F1"], "macro F1")):
        (config,) = preflight.runs_of(compare.asked(compare.parse([*asked, *more])))["confirm"]
        assert config.metric == metric and config.to_json().get("metric", None) == metric


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there_is_refused_where_it_would_train(
    file: Path, model: str, task: str, runs: Path, monkeypatch, capsys
) -> None:
    own = [str(file), "+settings.device=cuda", "--runs", str(runs)]
    compared = ["--model", model, "--task", task, "--projections", "unilora", "--budget", "200", "--lr", "0.02"]
    refused = "the device cuda must be one of this machine, got none"
    for command in (lambda: sweep.main(own), lambda: sweep.main([*own, "--doctor"]),
                    lambda: compare.main([*compared, "--device", "cuda", "--runs", str(runs)])):  # fmt: skip
        assert command() == 2
        assert refused in capsys.readouterr().err and not runs.exists()
    # the sweep may be meant for another machine: a dry run says so, and SLURM's nodes are others
    assert sweep.main([*own, "--dry-run"]) == 0
    assert f"device   config: {refused}" in capsys.readouterr().out
    monkeypatch.setattr(launchers.slurm, "train_all", lambda *_: {Path("a run"): "queued"})
    assert sweep.main([*own, "--launcher", "slurm"]) == 2
    assert "every trial must finish, got a failure in a run: queued" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_run_does_not_train_on_another_device_than_its_own(config: RunConfig, runs: Path, capsys) -> None:
    folder = prepare(runs, replace(config, device="cuda").to_json())
    assert train.main([str(folder)]) == 1
    assert "failed: config: the device cuda must be one of this machine" in capsys.readouterr().out
    assert not (folder / LOSSES).exists()
    # a finished one of another machine is scored on such a machine
    write_json(folder / RESULT, {"config": read_json(folder / CONFIG), "metric": "accuracy", "score": 0.5,
                                 "did_not_train": None})  # fmt: skip
    assert harness.main([str(folder)]) == 2
    assert "the device cuda must be one of this machine" in capsys.readouterr().err
