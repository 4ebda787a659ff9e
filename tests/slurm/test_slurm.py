"""Sweeps on a real SLURM: arrays under two caps, time limits, preemption, failures, a second launcher."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from experiments import train
from experiments.files import read_json
from experiments.records.reading import losses
from experiments.runs.callbacks import StopOnSignal
from experiments.runs.config import RunConfig
from experiments.runs.folder import RESULT, prepare
from experiments.sweeps import slurm, workers
from experiments.sweeps.slurm import SlurmOptions, train_all
from tests.experiments.processes import training_processes
from uniproj.format import THETA_D

pytestmark = pytest.mark.system
PARAMETERS = {"time": 30, "cpus_per_task": 1, "mem": "400M"}


@pytest.fixture(autouse=True)
def fast_polls(monkeypatch) -> None:
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.5)


def _prepared(runs: Path, config: RunConfig, count: int, **changes) -> list[Path]:
    seeds = range(1, 1 + count)
    return [prepare(runs, replace(config, train_seed=s, timing=False, **changes).to_json()) for s in seeds]


def _states() -> dict[str, str]:
    command = ["squeue", "--me", "--array", "--noheader", "--format=%i %T"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(line.split() for line in lines)


def _theta(folder: Path):
    return load_file(folder / "adapter" / "adapter_model.safetensors")[THETA_D]


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


class Launched:
    """A launcher at work in a thread; leaving the block waits for its end, an error in it cancels its jobs."""

    def __init__(self, folders: list[Path], options: SlurmOptions, logs: Path):
        self.failures: dict[Path, str] | None = None
        self._thread = threading.Thread(target=self._run, args=(folders, options, logs), daemon=True)

    def _run(self, *asked) -> None:
        self.failures = train_all(*asked)

    def __enter__(self) -> "Launched":
        self._thread.start()
        return self

    def wait_until(self, condition: Callable[[], object]) -> None:
        while not condition():
            assert self._thread.is_alive(), f"the launcher ended early: {self.failures}"
            time.sleep(0.1)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            subprocess.run(["scancel", "--me"], check=True)
        self._thread.join()


def test_an_array_finishes_below_both_caps(runs: Path, config: RunConfig, tmp_path: Path) -> None:
    folders = _prepared(runs, config, 3)
    with Watch() as seen:
        assert train_all(folders, SlurmOptions(PARAMETERS, concurrency=1, queue_cap=2), tmp_path / "logs") == {}
    assert all((folder / RESULT).exists() for folder in folders)
    assert seen.running == 1 and seen.queued == 2
    assert train_all(folders, SlurmOptions(PARAMETERS), tmp_path / "logs") == {}


# a plug-in of a run: within a job, steps take their time and are told, so that what stops it comes in between
SLOW_STEPS = """
import os, time
from experiments.runs.callbacks import StopOnSignal

plain = StopOnSignal.on_step_end

def slow(self, args, state, control, **kwargs):
    if "SLURM_JOB_ID" in os.environ:
        print(f"step {state.global_step}", flush=True)
        time.sleep(0.3)
    return plain(self, args, state, control, **kwargs)

StopOnSignal.on_step_end = slow
"""


def _preempt(_: str) -> None:
    """A job of the urgent partition takes the whole node."""
    subprocess.run(
        ["sbatch", "--partition=urgent", "--cpus-per-task=2", "--output=/dev/null", "--wrap=true"], check=True
    )


def _let_time_run_out(job: str) -> None:
    """Once the run trains, however long it took to load, two minutes are left; after the requeue, as many as before."""
    update = ["scontrol", "update", f"JobId={job}"]
    subprocess.run([*update, "EndTime=now+120seconds"], check=True)
    while _states()[job] != "PENDING":
        time.sleep(0.5)
    subprocess.run([*update, f"TimeLimit={PARAMETERS['time']}"], check=True)


# epochs of six steps: both are stopped before their end
@pytest.mark.parametrize(
    ("stop", "epochs"), [(_preempt, 6), pytest.param(_let_time_run_out, 60, marks=pytest.mark.slow)]
)
def test_a_run_that_is_stopped_is_requeued_and_resumes_to_the_same_numbers(
    stop: Callable[[str], None], epochs: int, runs: Path, config: RunConfig, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "slow.py").write_text(SLOW_STEPS)
    plugins = (str(tmp_path / "slow.py"),)
    long = replace(config, timing=False, epochs=epochs, evaluations=1, plugins=plugins)
    whole, folder = prepare(tmp_path / "whole", long.to_json()), prepare(runs, long.to_json())
    monkeypatch.setattr(StopOnSignal, "on_step_end", StopOnSignal.on_step_end)  # what the plug-in replaces, put back
    # the launcher knows its plugins, and tells its jobs
    assert train.main([str(whole), "--plugins", *plugins]) == 0
    with Launched([folder], SlurmOptions(PARAMETERS), tmp_path / "logs") as launcher:
        launcher.wait_until(lambda: losses(folder))
        (job,) = _states()
        stop(job)
    assert launcher.failures == {}
    (log,) = (tmp_path / "logs").glob("*_log.out")
    assert "Requeued job" in log.read_text()
    said = (folder / workers.LOG).read_text()
    steps = [int(line.removeprefix("step ")) for line in said.splitlines() if line.startswith("step ")]
    assert said.count(workers.STARTED) > 1 and steps == list(range(1, 6 * epochs + 1))
    assert (_theta(folder) == _theta(whole)).all()
    assert read_json(folder / RESULT)["score"] == read_json(whole / RESULT)["score"]


@pytest.mark.slow
def test_a_failure_is_reported_with_its_last_words_and_the_others_finish(
    runs: Path, config: RunConfig, tmp_path: Path
) -> None:
    (good,) = _prepared(runs, config, 1)
    bad = prepare(runs, replace(config, projection="nothing", timing=False).to_json())
    failures = train_all([bad, good], SlurmOptions(PARAMETERS), tmp_path / "logs")
    assert set(failures) == {bad} and "unknown projection 'nothing'" in failures[bad]
    assert (good / RESULT).exists()


@pytest.mark.slow
def test_a_second_launcher_waits_for_what_is_queued(runs: Path, config: RunConfig, tmp_path: Path) -> None:
    folders = _prepared(runs, config, 2)
    options, logs = SlurmOptions(PARAMETERS, concurrency=1), tmp_path / "logs"
    with Launched(folders, options, logs) as first:
        first.wait_until((logs / slurm.JOBS).exists)
        submitted = (logs / slurm.JOBS).read_text()
        assert train_all(folders, options, logs) == {}
    assert first.failures == {} and (logs / slurm.JOBS).read_text() == submitted
    assert [(folder / workers.LOG).read_text().count(workers.STARTED) for folder in folders] == [1, 1]


@pytest.mark.slow
def test_a_killed_run_is_reported_and_a_further_call_finishes_it(runs: Path, config: RunConfig, tmp_path: Path) -> None:
    (folder,) = _prepared(runs, config, 1, epochs=150)
    options = SlurmOptions(PARAMETERS)
    with Launched([folder], options, tmp_path / "logs") as launcher:
        launcher.wait_until(lambda: losses(folder))
        for process in training_processes(folder):
            os.kill(process, signal.SIGKILL)
    assert set(launcher.failures) == {folder}
    assert train_all([folder], options, tmp_path / "logs") == {} and (folder / RESULT).exists()
