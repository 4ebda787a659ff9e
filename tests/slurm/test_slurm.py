"""Sweeps on a real SLURM: arrays under two caps, time limits, preemption, failures, a second launcher."""

import os
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from experiments import slurm, train
from experiments.config import RunConfig
from experiments.results import RESULT, metrics, prepare, read_json
from experiments.slurm import SlurmOptions, train_all
from tests.experiments.processes import training_processes

pytestmark = pytest.mark.slow
PARAMETERS = {"time": 5, "cpus_per_task": 1, "mem": "400M"}


@pytest.fixture(autouse=True)
def fast_polls(monkeypatch) -> None:
    monkeypatch.setattr(slurm, "POLL_SECONDS", 1.0)


def _prepared(runs: Path, config: RunConfig, count: int, **changes) -> list[Path]:
    seeds = range(1, 1 + count)
    return [prepare(runs, replace(config, train_seed=s, timing=False, **changes).to_json()) for s in seeds]


def _states() -> dict[str, str]:
    command = ["squeue", "--me", "--array", "--noheader", "--format=%i %T"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(line.split() for line in lines)


def _theta(folder: Path):
    return load_file(folder / "adapter" / "adapter_model.safetensors")["base_model.uniproj_theta_d"]


class Watch:
    """The most jobs seen in the queue, and running, while its block runs."""

    def __enter__(self) -> "Watch":
        self.queued = self.running = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._stop.wait(0.3):
            states = list(_states().values())
            self.queued = max(self.queued, sum(state != "COMPLETING" for state in states))
            self.running = max(self.running, states.count("RUNNING"))

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def test_an_array_finishes_below_both_caps(runs: Path, config: RunConfig, tmp_path: Path) -> None:
    folders = _prepared(runs, config, 5)
    with Watch() as seen:
        assert train_all(folders, SlurmOptions(PARAMETERS, concurrency=1, queue_cap=3), tmp_path / "logs") == {}
    assert all((folder / RESULT).exists() for folder in folders)
    assert seen.running == 1 and seen.queued == 3
    assert train_all(folders, SlurmOptions(PARAMETERS), tmp_path / "logs") == {}


@pytest.mark.parametrize("how", ["preemption", "time limit"])
def test_a_run_that_is_stopped_is_requeued_and_resumes_to_the_same_numbers(
    how: str, runs: Path, config: RunConfig, tmp_path: Path
) -> None:
    long = replace(config, timing=False, epochs=700 if how == "time limit" else 150, evaluations=2)
    whole = prepare(tmp_path / "whole", long.to_json())
    assert train.main([str(whole)]) == 0
    folder = prepare(runs, long.to_json())
    limit = {"time": 1, "signal_delay_s": 15} if how == "time limit" else {}
    options = SlurmOptions({**PARAMETERS, **limit})
    failures: dict = {}
    launcher = threading.Thread(target=lambda: failures.update(train_all([folder], options, tmp_path / "logs")))
    launcher.start()
    if how == "preemption":
        while not metrics(folder):
            time.sleep(0.2)
        (job,) = _states()
        subprocess.run(["scancel", "--signal=USR2", job], check=True)
    launcher.join()
    assert failures == {}
    (log,) = (tmp_path / "logs").glob("*_log.err")
    assert "requeue" in log.read_text().lower()
    assert (_theta(folder) == _theta(whole)).all()
    assert read_json(folder / RESULT)["score"] == read_json(whole / RESULT)["score"]


def test_a_failure_is_reported_with_its_last_words_and_the_others_finish(
    runs: Path, config: RunConfig, tmp_path: Path
) -> None:
    (good,) = _prepared(runs, config, 1)
    bad = prepare(runs, replace(config, projection="nothing", timing=False).to_json())
    failures = train_all([bad, good], SlurmOptions(PARAMETERS), tmp_path / "logs")
    assert set(failures) == {bad} and "unknown projection 'nothing'" in failures[bad]
    assert (good / RESULT).exists()


def test_a_second_launcher_waits_for_what_is_queued(runs: Path, config: RunConfig, tmp_path: Path) -> None:
    folders = _prepared(runs, config, 2)
    options, logs = SlurmOptions(PARAMETERS, concurrency=1), tmp_path / "logs"
    first = threading.Thread(target=lambda: train_all(folders, options, logs))
    first.start()
    while not (logs / slurm.JOBS).exists():
        time.sleep(0.1)
    submitted = (logs / slurm.JOBS).read_text()
    assert train_all(folders, options, logs) == {}
    first.join()
    assert (logs / slurm.JOBS).read_text() == submitted


def test_a_killed_run_is_reported_and_a_further_call_finishes_it(runs: Path, config: RunConfig, tmp_path: Path) -> None:
    (folder,) = _prepared(runs, config, 1, epochs=150)
    failures: dict = {}
    options = SlurmOptions(PARAMETERS)
    launcher = threading.Thread(target=lambda: failures.update(train_all([folder], options, tmp_path / "logs")))
    launcher.start()
    while not metrics(folder):
        time.sleep(0.2)
    for process in training_processes(folder):
        os.kill(process, signal.SIGKILL)
    launcher.join()
    assert set(failures) == {folder}
    assert train_all([folder], options, tmp_path / "logs") == {} and (folder / RESULT).exists()
