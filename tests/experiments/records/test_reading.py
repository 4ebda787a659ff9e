"""Runs on disk: stable names, whole files or none, damage is named."""

import errno
import json
import math
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest

from experiments.errors import ExperimentError
from experiments.files import digest, read_json, write_json
from experiments.records.reading import damage, is_done, load, losses, row
from experiments.runs.config import RunConfig
from experiments.runs.folder import RESULT, prepare
from experiments.tasks.task import METRICS, RANGES, is_score, score


def test_the_name_of_a_run_is_the_hash_of_its_configuration() -> None:
    import hashlib

    assert digest({"b": 1, "a": "x"}) == hashlib.sha256(b'{"a":"x","b":1}').hexdigest()[:12]
    assert digest({"a": 1}) != digest({"a": 2})


def test_a_configuration_survives_json(config: RunConfig) -> None:
    assert RunConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(ExperimentError, match=r"difference in \['epochs'\]"):
        RunConfig.from_json({k: v for k, v in config.to_json().items() if k != "epochs"})


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"score": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExperimentError, match=r"No space left on device. Nothing saved before is lost"):
        write_json(path, {"score": 2})
    assert read_json(path) == {"score": 1} and os.listdir(tmp_path) == ["result.json"]


def test_numbers_that_are_not_finite_are_refused(tmp_path) -> None:
    with pytest.raises(ExperimentError, match="must hold finite numbers"):
        write_json(tmp_path / "x.json", {"score": float("nan")})


@pytest.mark.parametrize("text", ['{"score": 0.', "[1]", "", "\0" * 512, "[" * 100_000, '{"score": NaN}'])
def test_a_damaged_result_is_named_and_never_counted_as_done(tmp_path, text: str) -> None:
    (tmp_path / RESULT).write_text(text)
    with pytest.raises(ExperimentError, match=RESULT):
        is_done(tmp_path)
    with pytest.raises(ExperimentError, match=RESULT):
        load(tmp_path)


@pytest.fixture
def finished(runs, config: RunConfig):
    """A folder of a finished run; values of its result, or `config`, may be given."""

    def write(**values) -> Path:
        folder = prepare(runs, config.to_json())
        result = {"config": config.to_json(), "metric": "accuracy", "score": 0.5, "did_not_train": None}
        (folder / RESULT).write_text(json.dumps({**result, **values}))
        return folder

    return write


NAN = float("nan")
TAMPERED = {
    "a score of 99": ({"score": 99}, r"score of accuracy must lie in \[0, 1\], got 99. It was edited"),
    "below": ({"score": -0.1}, r"score of accuracy must lie in \[0, 1\], got -0.1"),
    "a correlation": ({"metric": "Pearson", "score": -1.1}, r"score of Pearson must lie in \[-1, 1\], got -1.1"),
    "a text": ({"score": "0.9"}, "score must be a finite number or null, got '0.9'. It was edited"),
    "true": ({"score": True}, "score must be a finite number or null, got True"),
    "NaN": ({"score": NAN}, "must be whole JSON, got NaN, which JSON does not have"),
    "another metric": ({"metric": "kappa"}, "metric must be one of accuracy, F1, macro F1, .* got 'kappa'"),
    "a list": ({"metric": ["accuracy"]}, r"metric must be text, got \['accuracy'\]"),
    "did not train": ({"did_not_train": False}, "did_not_train must be text or null, got False"),
    "the best": ({"best": {"score": 1.5, "scores": {}}}, "best.score of accuracy must lie in"),
    "half a best": ({"best": {"score": 1}}, "best.scores must be there, got keys 'score'"),
    "another score": ({"scores": {"Matthews": -2}}, "scores.Matthews of Matthews must lie in"),
    "a part": ({"groups": {"gsm8k": 50}}, "groups.gsm8k of accuracy must lie in"),
    "the majority": ({"majority": 2}, "majority of accuracy must lie in"),
    "validation": ({"validation": 2, "selection": "score"}, "validation of accuracy must lie in"),
    "trained": ({"trained": 4740.5}, "trained must be an integer or null, got 4740.5"),
    "cost": ({"cost": {"seconds": "1"}}, "cost.seconds must be a finite number, got '1'"),
    "origin": ({"provenance": {}}, "provenance.versions must be there"),
    "no configuration": ({"config": {}}, "config.task must be there, got keys none"),
    "a seed": ("data_seed", "config.data_seed must be an integer, got '7'"),
    "another rate": ("lr", "config must be the one whose hash the folder bears, got [0-9a-f]{12}"),
    "nothing": (None, "config must be there, got keys none"),
}


@pytest.mark.parametrize("tampered", TAMPERED)
def test_a_result_that_cannot_be_its_runs_is_not_believed(tampered: str, finished, config: RunConfig) -> None:
    values, message = TAMPERED[tampered]
    if isinstance(values, str):
        values = {"config": {**config.to_json(), values: {"lr": 0.7, "data_seed": "7"}[values]}}
    folder = finished(**(values or {}))
    if values is None:
        (folder / RESULT).write_text("{}")
    for reader in (is_done, row, lambda folder: load(folder.parent)):
        with pytest.raises(ExperimentError, match=message) as error:
            reader(folder)
        assert str(folder / RESULT) in str(error.value)
    assert damage(folder) == str(error.value)


def test_a_result_beside_another_configuration_is_not_believed(finished, config: RunConfig) -> None:
    folder = finished()
    assert is_done(folder) and row(folder)["score"] == 0.5 and damage(folder) is None
    assert row(Path(shutil.copytree(folder, folder.with_name("a copy"))))["score"] == 0.5
    for text in (json.dumps({**config.to_json(), "lr": 1.0}), "\0" * 64):
        (folder / "config.json").write_text(text)
        with pytest.raises(ExperimentError, match=r"config.json must"):
            row(folder)


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_has_the_range_of_its_scores(metric: str) -> None:
    assert RANGES.keys() == METRICS.keys()
    low, high = RANGES[metric]
    one = pd.Series([0, 1, 0, 1, 1])
    assert score(metric, pd.DataFrame({"label": one, "prediction": one})) == pytest.approx(high)
    assert score(metric, pd.DataFrame({"label": one, "prediction": 1 - one})) == pytest.approx(low)
    assert is_score(metric, low) and is_score(metric, high) and not is_score(metric, high + 1e-6)
    assert not any(is_score(metric, bad) for bad in (NAN, math.inf, "1", True, None))


def test_an_edited_configuration_is_refused(runs, config: RunConfig) -> None:
    folder = prepare(runs, config.to_json())
    assert prepare(runs, config.to_json()) == folder and not is_done(folder)
    write_json(folder / "config.json", {**config.to_json(), "lr": 1.0})
    with pytest.raises(ExperimentError, match="It was edited"):
        prepare(runs, config.to_json())


def test_a_line_cut_off_by_an_interruption_is_left_out(tmp_path) -> None:
    line = '{"step": 1, "of": 9, "loss": 0.7}\n'
    (tmp_path / "metrics.jsonl").write_text(f'{line}{{"step": 2, "o')
    assert losses(tmp_path) == [json.loads(line)]


@pytest.mark.parametrize(
    "damage",
    [
        bytes(4096),
        b"\xff\xfe\x00",
        b"[1, 2]\n",
        b"{}\n",
        b'{"step": 2, "of": 9, "loss": "low"}\n',
        b'{"step": 2, "of": 9, "loss": NaN}\n',
        b'{"step": 2, "of": null, "loss": 0.7}\n',
        b'{"step": 2, "of": 9, "loss": 1' + b"0" * 400 + b"}\n",
        b"[" * 100_000 + b"\n",
        b'{"step": 2, "of": 9, "lo\n',
    ],
    ids=lambda damage: repr(damage[:24]),
)
def test_the_lines_before_a_damaged_one_are_read(damage: bytes, tmp_path) -> None:
    whole = b'{"step": 1, "of": 9, "loss": 0.7}\n{"step": 2, "of": 9, "loss": null}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + damage + b'{"step": 4, "of": 9, "loss": 0.1}\n')
    assert losses(tmp_path) == [json.loads(line) for line in whole.splitlines()]
