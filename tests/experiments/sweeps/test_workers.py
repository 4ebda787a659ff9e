"""Processes that train runs: they end with their launcher, and say one line each where nobody watches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import train
from experiments.errors import ExperimentError
from experiments.processes import Processes
from experiments.runs import distributed
from experiments.runs.folder import LOSSES, RESULT
from experiments.sweeps import workers
from tests.experiments.processes import ROOT
from tests.sweeps import made_up, write_run

LAUNCHER = """
import signal, sys
from pathlib import Path
from experiments.sweeps import workers

sys.executable = sys.argv[2]
workers.start(Path(sys.argv[1]))
signal.pause()
"""
# in place of Python: with a run it opens a pipe, and says so if it lives for long
RUN = """#!{python} -S
import os, sys, time
if sys.argv[1] != "-m":
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with open({fifo!r}, "w") as fifo:
    time.sleep(20)
    fifo.write("alive")
"""


@pytest.mark.system
def test_what_a_launcher_started_ends_with_it(tmp_path: Path) -> None:
    fifo, run = tmp_path / "fifo", tmp_path / "run"
    os.mkfifo(fifo)
    run.write_text(RUN.format(python=sys.executable, fifo=str(fifo)))
    run.chmod(0o755)
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path), str(run)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # the pipe opens when the run has opened it, too
    with subprocess.Popen(command, cwd=ROOT, env=environment) as launcher, fifo.open() as opened:
        launcher.kill()
        assert opened.read() == ""


def test_a_process_of_torchrun_ends_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parents: list[int] = []
    monkeypatch.setattr(train, "end_with", parents.append)
    assert train.main([str(tmp_path)]) == 1 and parents == []  # by hand, its parent may be a shell that is closed
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert train.main([str(tmp_path)]) == 1 and parents == [os.getppid()]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    done = tmp_path / write_run(tmp_path, made_up(["glue/rte"], ["lora"], 1).iloc[0].to_dict())
    found = [tmp_path / name for name in ("trains", "fails")]
    for folder in found:
        folder.mkdir()
    return [done, *found]


def test_one_line_for_each_run_where_standard_error_is_no_terminal(folders: list[Path], monkeypatch, capsys) -> None:
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.01)
    status = {"trains": "exit 0", "fails": "exit 1"}
    monkeypatch.setattr(workers, "start", lambda folder, *_: subprocess.Popen(["sh", "-c", status[folder.name]]))
    assert list(workers.train_all(folders, "cpu")) == [folders[2]]
    first, second = sorted(capsys.readouterr().err.splitlines())
    assert first.startswith("2 of 3 runs: ") and second.startswith("3 of 3 runs: ")
    assert {line.partition(": ")[2] for line in (first, second)} == {f"{folders[1]} done", f"{folders[2]} failed"}


def test_a_damaged_result_fails_its_own_run_alone(folders: list[Path], monkeypatch) -> None:
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(workers, "start", lambda *_: subprocess.Popen(["true"]))
    (folders[0] / RESULT).write_bytes(bytes(512))
    failures = workers.train_all(folders[:2], "cpu")
    assert list(failures) == [folders[0]] and "result.json must be whole JSON" in failures[folders[0]]


def test_train_says_how_it_is_used(tmp_path: Path, capsys) -> None:
    for words, status, said in (["--help"], 0, "usage: python -m experiments.train"), ([], 2, "required: folder"):
        with pytest.raises(SystemExit) as ended:
            train.main(words)
        caught = capsys.readouterr()
        assert ended.value.code == status and said in caught.out + caught.err
    assert train.main([str(tmp_path)]) == 1
    assert f"failed: train: {tmp_path} must be the folder of a run, got no config.json there" in capsys.readouterr().out


LAUNCH = ["python", "/bin/accelerate", "launch"]
SEVERAL = ["--num_machines", "2", "--machine_rank", "1", "--main_process_ip", "10.0.0.1", "--main_process_port", "9"]


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ([*LAUNCH, "--cpu", "--num_processes", "2", "-m", "experiments.train", "RUN"], Processes(2)),
        (["python", "/bin/accelerate-launch", "--num-processes=3", "-m", "experiments.train", "RUN"], Processes(3)),
        (["python", "-m", "accelerate.commands.launch", "--cpu", "-m", "experiments.train", "RUN"], Processes(1)),
        ([*LAUNCH, "--cpu", "--num_processes", "1", "-m", "experiments.train", "--num_processes"], Processes(1)),
        ([*LAUNCH, "--num_processes", "4", *SEVERAL, "-m", "x"], Processes(2, nodes=2, node=1, address="10.0.0.1:9")),
        (["bash"], Processes(1)),
    ],
)
def test_accelerate_is_asked_how_many_processes_it_should_have_started(
    words: list[str], asked: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Parent:
        def __init__(self, pid: int):
            assert pid == os.getppid()

        def cmdline(self) -> list[str]:
            return words

    monkeypatch.setattr(distributed.psutil, "Process", Parent)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.asked_of_accelerate() == Processes(1)  # started by hand
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    found = distributed.asked_of_accelerate()
    assert (found.torchrun(), found) == (asked.torchrun(), Processes(**{**vars(asked), "address": found.address}))
    monkeypatch.setenv("WORLD_SIZE", "2")  # it did start them, or torchrun did
    assert distributed.asked_of_accelerate() == Processes(1)


def test_a_configuration_of_accelerate_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "two.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n"
    )
    words = [*LAUNCH, "--config_file", str(file), "-m", "experiments.train", "RUN"]
    monkeypatch.setattr(distributed.psutil, "Process", lambda _: type("", (), {"cmdline": lambda self: words})())
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert distributed.asked_of_accelerate().processes == 2
    started: list[list[str]] = []
    monkeypatch.setattr(train, "end_with", lambda _: None)
    monkeypatch.setattr(os, "execv", lambda _, command: started.append(command) or sys.exit(0))
    with pytest.raises(SystemExit):
        train.main([str(tmp_path)])
    assert started == [[sys.executable, "-m", *Processes(2).torchrun(), "experiments.train", str(tmp_path)]]


def test_a_log_is_not_written_through_a_link(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("kept")
    (tmp_path / workers.LOG).symlink_to(theirs)
    with pytest.raises(ExperimentError, match=r"train\.log must be writable"):
        workers.start(tmp_path)
    assert theirs.read_text() == "kept"


def test_zeros_in_the_log_of_a_run_do_not_stop_its_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.01)
    started: list[Path] = []

    def start(folder: Path, *_: object) -> subprocess.Popen:
        started.append(folder)
        return subprocess.Popen(["true"])

    monkeypatch.setattr(workers, "start", start)
    folders = [tmp_path / name for name in ("cut", "whole")]
    for folder in folders:
        folder.mkdir()
    line = b'{"step": 1, "of": 9, "loss": 0.7}\n'
    (folders[0] / LOSSES).write_bytes(line + bytes(4096) + b"\n" + line)  # as a power cut leaves it
    assert workers.train_all(folders, "cpu") == {} and started == folders
