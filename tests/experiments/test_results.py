"""Runs on disk: stable names, whole files or none, damage is named."""

import errno
import json
import os

import pytest

from experiments import rates
from experiments.config import RunConfig
from experiments.errors import ExperimentError
from experiments.results import RESULT, digest, is_done, load, metrics, prepare, read_json, write_json


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


@pytest.mark.parametrize("text", ['{"score": 0.', "[1]", ""])
def test_a_damaged_result_is_named_and_never_counted_as_done(tmp_path, text: str) -> None:
    (tmp_path / RESULT).write_text(text)
    with pytest.raises(ExperimentError, match=RESULT):
        is_done(tmp_path)
    with pytest.raises(ExperimentError, match=RESULT):
        load(tmp_path)


def test_an_edited_configuration_is_refused(runs, config: RunConfig) -> None:
    folder = prepare(runs, config.to_json())
    assert prepare(runs, config.to_json()) == folder and not is_done(folder)
    write_json(folder / "config.json", {**config.to_json(), "lr": 1.0})
    with pytest.raises(ExperimentError, match="It was edited"):
        prepare(runs, config.to_json())


def test_a_line_cut_off_by_an_interruption_is_left_out(tmp_path) -> None:
    line = '{"step": 1, "of": 9, "loss": 0.7}\n'
    (tmp_path / "metrics.jsonl").write_text(f'{line}{{"step": 2, "o')
    assert metrics(tmp_path) == [json.loads(line)]


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
    assert metrics(tmp_path) == [json.loads(line) for line in whole.splitlines()]


def test_the_best_rate_ignores_runs_that_did_not_train() -> None:
    trials = [
        {"projection": "a", "lr": 0.1, "validation": 0.9, "did_not_train": "the loss stayed"},
        {"projection": "a", "lr": 0.01, "validation": 0.8, "did_not_train": None},
        {"projection": "a", "lr": 0.001, "validation": 0.8, "did_not_train": None},
    ]
    assert rates.best(trials) == {"a": 0.001}
    with pytest.raises(ExperimentError, match=r"got none for nothing.*Known: "):
        rates.load(["nothing"])


def test_the_committed_rates_are_those_of_the_committed_record() -> None:
    from experiments.config import COMPARED
    from experiments.tune import RECORD

    record = read_json(RECORD / "minilm-vader.json")
    trials = [{**record["common"], **trial} for trial in record["trials"]]
    assert rates.load(COMPARED) == rates.best(trials) == record["best"]
    assert record["common"]["score_on"] == "validation"
    per_projection = {p: sum(t["projection"] == p for t in trials) for p in COMPARED}
    assert min(per_projection.values()) >= 4
