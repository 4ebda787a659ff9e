"""Kills, a full disk, two launchers: nothing is lost or done twice, and what resumes gives identical records."""

import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from experiments import sweep, train
from experiments.files import read_json
from experiments.records.reading import load, losses
from experiments.runs.callbacks import StopOnSignal
from experiments.runs.config import RunConfig
from experiments.runs.folder import LOSSES, RESULT, prepare
from experiments.sweeps import workers
from experiments.sweeps.file import CONF
from tests.experiments.processes import ROOT, start_sweep, training_processes

# a single trial of each cell, which has no edge
ONE_RATE = "tune.lr=[0.05]"
# what the clock and the machine decide
NOT_COMPARED = ["cost", "provenance", "folder"]
STATE = "trainer_state.json"


def _records(runs: Path) -> pd.DataFrame:
    return load(runs).drop(columns=NOT_COMPARED).sort_values("adapter_sha256", ignore_index=True)


def _finished(runs: Path) -> dict[Path, tuple[int, bytes]]:
    """Every result, each of them whole, and when it was written."""
    found = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in runs.rglob(RESULT)}
    assert all(read_json(path)["adapter_sha256"] for path in found)
    return found


# where a run dies of SIGKILL, and how many of its twelve steps the second start trains, with a checkpoint after six and
# twelve: in the eighth step; while the second checkpoint is written, a file of it cut short; or while the result is
# written, of which half has reached the disk
MOMENTS = {"step": 6, STATE: 6, "optimizer.pt": 6, "adapter_model.safetensors": 6, RESULT: 0}
# a process that forks one for each of these moments: its libraries are imported once
KILLED = """
import os, signal, sys
from pathlib import Path
from transformers import Trainer
from experiments import train
from experiments.runs.callbacks import StopOnSignal
from tests.forked import exitcode, fork

save, replace, step_end = Trainer._save_checkpoint, os.replace, StopOnSignal.on_step_end

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

def on_step_end(self, args, state, *rest, **options):
    if moment == "step" and state.global_step == 8:
        die()
    return step_end(self, args, state, *rest, **options)

def saving(self, *args):
    save(self, *args)
    whole = sorted(Path(self.args.output_dir).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    if len(whole) == 2 and moment not in ("step", "result.json"):
        cut(whole[-1] / moment)
        if moment != "trainer_state.json":
            (whole[-1] / "trainer_state.json").unlink()
        die()

def replacing(source, target):
    if moment == Path(target).name == "result.json":
        cut(Path(source))
        die()
    replace(source, target)

StopOnSignal.on_step_end, Trainer._save_checkpoint, os.replace = on_step_end, saving, replacing
for moment, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    assert exitcode(fork(lambda: train.main([folder]), seconds=120)) == -signal.SIGKILL, moment
"""


@pytest.mark.system
def test_a_killed_run_goes_on_from_its_last_whole_checkpoint_to_identical_records(
    runs: Path, tmp_path: Path, config: RunConfig, monkeypatch
) -> None:
    twice = replace(config, evaluations=2, timing=False).to_json()
    whole, folders = prepare(tmp_path / "whole", twice), {moment: prepare(runs / moment, twice) for moment in MOMENTS}
    assert train.main([str(whole)]) == 0
    words = [word for moment, folder in folders.items() for word in (moment, str(folder))]
    subprocess.run([sys.executable, "-c", KILLED, *words], cwd=ROOT, check=True)
    trained, plain = [], StopOnSignal.on_step_end

    def counted(self, args, state, control, **options):
        trained.append(state.global_step)
        return plain(self, args, state, control, **options)

    monkeypatch.setattr(StopOnSignal, "on_step_end", counted)
    same = [key for key in read_json(whole / RESULT) if key not in NOT_COMPARED]
    for moment, folder in folders.items():
        assert not (folder / RESULT).exists(), moment
        trained.clear()
        assert train.main([str(folder)]) == 0, moment
        assert not list(folder.glob(".uniproj-*")), moment  # of the killed process
        assert trained == list(range(13 - MOMENTS[moment], 13)), moment
        found, wanted = read_json(folder / RESULT), read_json(whole / RESULT)
        assert [found[key] for key in same] == [wanted[key] for key in same], moment
        assert [line["step"] for line in losses(folder)] == [line["step"] for line in losses(whole)], moment


def _kill(process: subprocess.Popen, runs: Path) -> None:
    """Nothing of it stays alive."""
    process.kill()
    process.wait()
    while training_processes(runs):
        time.sleep(0.05)


def _wait_for_changes(process: subprocess.Popen, runs: Path, count: int) -> None:
    """Until so many times a step was logged, a checkpoint or a result written, or the sweep has ended."""
    before = None
    while count and process.poll() is None:
        seen = {path: path.stat().st_size for name in (LOSSES, STATE, RESULT) for path in _there(runs, name)}
        count -= before is not None and seen != before
        before = seen
        time.sleep(0.05)


def _there(runs: Path, name: str) -> list[Path]:
    return [path for path in runs.glob(f"*/*/**/{name}") if path.exists()]


@pytest.mark.slow
@pytest.mark.parametrize("base", ["tiny", "minilm"])
def test_the_smoke_sweep_survives_kill_9_and_resumes_to_identical_records(
    base: str, model: str, runs: Path, tmp_path: Path
) -> None:
    smoke, settings = CONF / "sweeps" / "smoke.yaml", [f"settings.model={model}"] if base == "tiny" else []
    whole = tmp_path / "whole"
    assert sweep.main([str(smoke), *settings, "--runs", str(whole)]) == 0
    draw, done, met = random.Random(0), {}, Counter()
    for _ in range(10):
        process = start_sweep(smoke, runs, *settings)
        _wait_for_changes(process, runs, draw.randint(1, 9))
        time.sleep(draw.uniform(0.0, 0.5))
        assert process.poll() in (None, 0)
        _kill(process, runs)
        now = _finished(runs)
        assert done.items() <= now.items()
        met["between runs"] += len(done) < len(now) < len(_finished(whole))
        met["in training"] += any(not (path.parents[1] / RESULT).exists() for path in _there(runs, STATE))
        done = now
    assert min(met["between runs"], met["in training"]) >= 2, met
    assert start_sweep(smoke, runs, *settings).wait() == 0
    assert done.items() <= _finished(runs).items()
    pd.testing.assert_frame_equal(_records(runs), _records(whole))
    for name in ("summary.csv", "paired.csv"):
        own, other = runs / "sweeps" / "smoke" / name, whole / "sweeps" / "smoke" / name
        assert own.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_two_launchers_share_the_work(file: Path, runs: Path) -> None:
    first, second = start_sweep(file, runs, ONE_RATE), start_sweep(file, runs, ONE_RATE)
    assert first.wait() == 0 and second.wait() == 0
    assert len(load(runs)) == 6
    logs = {path: path.read_text() for path in runs.rglob(workers.LOG)}
    # what Transformers says of the fresh head of each model that is loaded to be trained
    assert len(logs) == 6 and {text.count("LOAD REPORT") for text in logs.values()} == {1}


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_loses_nothing_and_says_so(file: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "none", str(disk)], check=False).returncode:
        pytest.skip("this machine does not let root mount a disk")
    try:
        assert start_sweep(file, disk, ONE_RATE, "axes.projection=[lora]", "+name=first").wait() == 0
        first = _finished(disk)
        # what is there, and less than a checkpoint more
        used = sum(path.stat().st_blocks * 512 for path in disk.rglob("*"))
        subprocess.run(["mount", "-o", f"remount,size={used + 64 * 1024}", str(disk)], check=True)
        full = start_sweep(file, disk, ONE_RATE, stderr=subprocess.PIPE, text=True)
        said = full.communicate()[1]
        assert full.returncode in (1, 2), said
        assert "No space left on device" in said and "the same command again" in said
        assert len(first) == 3 and _finished(disk) == first
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        assert start_sweep(file, disk, ONE_RATE).wait() == 0 and len(load(disk)) == 6
        assert first.items() <= _finished(disk).items()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
