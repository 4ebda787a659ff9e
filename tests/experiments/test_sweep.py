"""A sweep from end to end: the protocol, a user's own data and projection, crashes, two launchers, a full disk."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from experiments import sweep, tasks, train
from experiments.protocol import LOCK
from experiments.results import RESULT, load, prepare, read_json
from tests.experiments.processes import training_processes

ROOT = Path(__file__).parents[2]
# what the clock and the machine decide
NOT_COMPARED = ["cost", "provenance", "folder"]


@pytest.fixture
def file(tmp_path: Path, task: str, model: str) -> Path:
    path = tmp_path / "mine.yaml"
    settings = {"task": task, "model": model, "budget": 200, "epochs": 2, "evaluations": 2}
    content = {
        "settings": settings,
        "axes": {"projection": ["lora", "unilora"]},
        "tune": {"seeds": [0], "lr": [0.01, 0.05]},
        "seeds": [1, 2],
    }
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def here(monkeypatch) -> None:
    """Runs train in this process, which saves the seconds that a process takes to start."""
    monkeypatch.setattr(sweep, "train_all", lambda folders, *_: {f: "failed" for f in folders if train.main([str(f)])})


def _records(runs: Path) -> pd.DataFrame:
    return load(runs).drop(columns=NOT_COMPARED).sort_values("adapter_sha256", ignore_index=True)


def test_tune_lock_confirm(file: Path, runs: Path, here, capsys) -> None:
    assert sweep.main([str(file), "--runs", str(runs)]) == 0
    folder = runs / "sweeps" / "mine"
    lock, records = read_json(folder / LOCK), load(runs)
    tuning, confirmed = records[records["score_on"] == "validation"], records[records["score_on"] == "test"]
    assert len(tuning) == 4 and len(confirmed) == 4 and not set(tuning["train_seed"]) & set(confirmed["train_seed"])
    for choice in lock["choices"]:
        own = tuning[(tuning["projection"] == choice["cell"]["projection"]) & tuning["did_not_train"].isna()]
        if len(own):
            assert (
                choice["chosen"]["lr"]
                == own.sort_values(["validation_best", "lr"], ascending=[False, True])["lr"].iloc[0]
            )
        used = confirmed[confirmed["projection"] == choice["cell"]["projection"]]
        assert set(used["lr"]) == {choice["chosen"]["lr"]}
    out = capsys.readouterr().out
    assert "2 trials per cell" in out and "best" in out and (folder / "paired.csv").exists()

    # the same command does nothing again; a changed grid is refused because the choice is locked
    stamps = {path: path.stat().st_mtime_ns for path in runs.rglob(RESULT)}
    assert sweep.main([str(file), "--runs", str(runs)]) == 0
    assert {path: path.stat().st_mtime_ns for path in runs.rglob(RESULT)} == stamps
    assert sweep.main([str(file), "tune.lr=[0.01,0.1]", "--runs", str(runs)]) == 2
    assert "changed after its choice was locked" in capsys.readouterr().err


def test_the_best_and_the_last_checkpoint_are_both_scored(file: Path, runs: Path, here) -> None:
    assert sweep.main([str(file), "settings.epochs=4", "settings.evaluations=4", "--runs", str(runs)]) == 0
    records = load(runs)
    for record in records[records["score_on"] == "test"].to_dict("records"):
        steps = pd.read_csv(Path(record["folder"]) / "predictions-last.csv")
        assert record["score"] == (steps["label"] == steps["prediction"]).mean()
        best = Path(record["folder"]) / "predictions-best.csv"
        assert best.exists() == (record["best_step"] != record["step"])
        if best.exists():
            rows = pd.read_csv(best)
            assert record["best"]["score"] == (rows["label"] == rows["prediction"]).mean()
        assert record["validation_best"] >= record["validation"]
    assert not list(runs.rglob("checkpoint-*"))


def test_own_data_and_own_projection_join_by_two_lines(file: Path, runs: Path, tmp_path: Path, task: str) -> None:
    own = shutil.copy(ROOT / "examples" / "cyclic.py", tmp_path / "mine.py")
    rows = shutil.copytree(task, tmp_path / "my_reviews")
    settings = {**json.loads(file.read_text())["settings"], "task": str(rows), "plugins": [str(own)], "lr": 0.05}
    file.write_text(json.dumps({"settings": settings, "axes": {"projection": ["cyclic", "unilora"]}}))
    # in a process of its own: a registered name stays
    assert _start(file, runs).wait() == 0
    found = load(runs)
    assert set(found["projection"]) == {"cyclic", "unilora"} and set(found["task"]) == {str(rows)}
    assert set(found["trained"]) == {200} and (found["theta_change"] > 0).all()


def test_a_plugin_that_cannot_be_imported_is_named(file: Path, runs: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    assert sweep.main([str(file), f"+settings.plugins=[{tmp_path / 'broken.py'}]", "--runs", str(runs)]) == 2
    assert "broken.py must be a Python file or module that can be imported" in capsys.readouterr().err


def test_an_unknown_word_for_a_launcher_is_refused(file: Path, runs: Path, capsys) -> None:
    assert sweep.main([str(file), "+launcher.local={gpus:2}", "--runs", str(runs)]) == 2
    assert "launcher.local must have keys among processes, sharded" in capsys.readouterr().err and not runs.exists()


def test_doctor_runs_each_kind_once_and_feeds_the_estimate(file: Path, runs: Path, capsys) -> None:
    assert sweep.main([str(file), "--doctor", "--runs", str(runs)]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 kinds of run work" in out and not list(runs.rglob(RESULT))
    assert sweep.main([str(file), "--dry-run", "--runs", str(runs)]) == 0
    out = capsys.readouterr().out
    assert "GB per run" in out and "h of training steps" in out and "not known" not in out


def test_doctor_reports_what_would_fail_in_the_queue(file: Path, runs: Path, capsys, monkeypatch) -> None:
    from experiments.run import Run

    monkeypatch.setattr(Run, "load", lambda folder: (_ for _ in ()).throw(RuntimeError("no room")))
    assert sweep.main([str(file), "--doctor", "--runs", str(runs)]) == 1
    assert "FAILED" in (out := capsys.readouterr().out) and "no room" in out and "0 of 2 kinds of run work" in out


def _start(file: Path, runs: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.sweep", str(file), "--runs", str(runs)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _kill_everything(process: subprocess.Popen, runs: Path) -> None:
    process.kill()
    process.wait()
    for child in training_processes(runs):
        os.kill(child, signal.SIGKILL)


@pytest.mark.slow
def test_kill_9_at_any_moment_resumes_to_identical_records(file: Path, runs: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert sweep.main([str(file), "--runs", str(whole)]) == 0
    draw = random.Random(0)
    for _ in range(8):
        process = _start(file, runs)
        time.sleep(draw.uniform(3.0, 16.0))
        _kill_everything(process, runs)
        for path in runs.rglob(RESULT):
            assert read_json(path)["adapter_sha256"]
    assert _start(file, runs).wait() == 0
    pd.testing.assert_frame_equal(_records(runs), _records(whole))
    for name in ("summary.csv", "paired.csv"):
        own, other = runs / "sweeps" / "mine" / name, whole / "sweeps" / "mine" / name
        assert own.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("moment", ["trainer_state.json", "optimizer.pt", "adapter_model.safetensors"])
def test_a_kill_while_saving_resumes_to_identical_records(runs: Path, tmp_path: Path, config, moment: str) -> None:
    whole = prepare(tmp_path / "whole", config.to_json())
    assert train.main([str(whole)]) == 0
    folder = prepare(runs, config.to_json())
    killed = subprocess.run([sys.executable, "-c", KILL_IN_SAVE, moment, str(folder)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL and not (folder / RESULT).exists()
    assert train.main([str(folder)]) == 0
    timed = ["step_", "seconds"]
    same = [k for k in read_json(whole / RESULT) if k not in NOT_COMPARED and not k.startswith(tuple(timed))]
    assert [read_json(folder / RESULT)[k] for k in same] == [read_json(whole / RESULT)[k] for k in same]


# a process that dies halfway through the second checkpoint, its file cut short
KILL_IN_SAVE = """
import os, signal, sys
from pathlib import Path
from transformers import Trainer
from experiments import train

plain = Trainer._save_checkpoint

def dying(self, *args):
    plain(self, *args)
    newest = max(Path(self.args.output_dir).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    cut = newest / sys.argv[1]
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    state = newest / "trainer_state.json"
    if cut != state:
        state.unlink()
    os.kill(os.getpid(), signal.SIGKILL)

Trainer._save_checkpoint = dying
train.main([sys.argv[2]])
"""


@pytest.mark.slow
def test_two_launchers_share_the_work(file: Path, runs: Path) -> None:
    first, second = _start(file, runs), _start(file, runs)
    assert first.wait() == 0 and second.wait() == 0
    assert len(load(runs)) == 8
    ended = Counter(
        path for path in runs.rglob("train.log") for line in path.read_text().splitlines() if "train_runtime" in line
    )
    assert len(ended) == 8 and set(ended.values()) == {1}


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_loses_nothing_and_says_so(file: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(disk)], check=False).returncode:
        pytest.skip("this machine does not let root mount a disk")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "experiments.sweep", str(file), "--runs", str(disk)],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode in (1, 2)
        assert "No space left on device" in done.stderr and "the same command again" in done.stderr
        for path in disk.rglob(RESULT):
            assert read_json(path)["adapter_sha256"]
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        assert _start(file, disk).wait() == 0 and len(load(disk)) == 8
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_tuning_never_reads_the_test_split(file: Path, runs: Path, monkeypatch) -> None:
    from experiments import plan, protocol

    read = tasks.Task.split

    def guarded(self, name: str) -> pd.DataFrame:
        assert name != "test", "the test split was read"
        return read(self, name)

    monkeypatch.setattr(tasks.Task, "split", guarded)
    here = protocol.tune(plan.read(file), runs, lambda folders: {f: "failed" for f in folders if train.main([str(f)])})
    assert len(here) == 2
