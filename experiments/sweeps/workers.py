"""Many runs in few processes: one thread each, one progress display, a clean stop on Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from experiments.files import disk_errors
from experiments.models import trust
from experiments.orphans import ending_with_this
from experiments.processes import ALONE, SHARDED, Processes
from experiments.records import damage, is_done, losses
from experiments.runs import BUSY, FAILED, is_locked, tracking
from uniproj.console import DONE, Progress

ROOT = Path(__file__).parents[2]
LOG, STARTED = "train.log", "--- started ---"
# A run on the CPU takes one core and about 1 GB; more than four at once fill small machines.
_MOST_PROCESSES = 4
POLL_SECONDS = 0.5
_GRACE_SECONDS = 60.0


def runs_at_once(device: str, over: Processes = ALONE) -> int:
    """How many runs train at once: as many as the cores hold on the CPU, one on accelerators."""
    return max(1, min(_MOST_PROCESSES, os.cpu_count() or 1) // over.processes) if device == "cpu" else 1


def train_all(
    folders: Sequence[Path], device: str, over: Processes = ALONE, report_to: Sequence[str] = ()
) -> dict[Path, str]:
    """Train every run that is not done, each spread `over` these processes; returns the reason of each failure.

    KeyboardInterrupt passes through after every child has written its checkpoint and ended.
    """
    failures = {folder: said for folder in folders if (said := damage(folder))}
    waiting = [folder for folder in folders if folder not in failures and not is_done(folder)]
    words = [*trust.words(), *tracking.words(report_to)]
    with Progress("run", len(folders), len(folders) - len(waiting)) as progress, _Pool(over, words) as pool:
        slots = list(range(1, 1 + runs_at_once(device, over)))
        while waiting or pool.children:
            while slots and (folder := _startable(waiting, progress)):
                pool.start(folder, slots.pop(0))
            time.sleep(POLL_SECONDS)
            for child in pool.finished():
                slots.append(child.slot)
                # torchrun has an exit status of its own, whatever the run said
                if child.process.returncode == BUSY or (child.process.returncode and is_locked(child.folder)):
                    waiting.append(child.folder)
                    continue
                if child.process.returncode:
                    failures[child.folder] = last_words(child.folder)
                progress.ended(str(child.folder), "failed" if child.folder in failures else DONE)
    return failures


def _startable(waiting: list[Path], progress: Progress) -> Path | None:
    """Take the next run that nobody trains; those that another launcher has finished meanwhile are dropped."""
    for folder in list(waiting):
        if is_done(folder):
            waiting.remove(folder)
            progress.ended(str(folder))
        elif not is_locked(folder):
            waiting.remove(folder)
            return folder
    return None


def start(folder: Path, over: Processes = ALONE, words: Sequence[str] = ()) -> subprocess.Popen:
    """Begin to train a run, on one thread per process; what it prints is appended to its log. It ends with this one.

    words: `trust.words` of the launcher, since a run imports no plugin that its folder alone names, and
    `tracking.words`, since it reports to no tracker that its folder alone names.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        **({"CUDA_VISIBLE_DEVICES": visible} if not over.torchrun() else {}),
        SHARDED: str(over.sharded).lower(),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    with disk_errors(folder / LOG):  # the folder may be a stranger's, and nothing is written through a link
        file = os.open(folder / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with os.fdopen(file, "a") as log:
        log.write(STARTED + "\n")
        log.flush()
        command = [sys.executable, "-m", *over.torchrun(), "experiments.train", str(folder), *words]
        # a session of its own: Ctrl-C reaches the parent only, which tells the children once
        return subprocess.Popen(
            ending_with_this(command),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def last_words(folder: Path) -> str:
    """Why a run ended: what it said of its failure, or else the last line of its last start."""
    log = folder / LOG
    lines = log.read_text(errors="replace").rpartition(STARTED)[2].strip().splitlines() if log.exists() else []
    said = [line.removeprefix(FAILED) for line in lines if line.startswith(FAILED)]
    return said[0] if said else lines[-1] if lines else f"ended without a word, see {folder}"


class _Child:
    """One running process and its progress bar."""

    def __init__(self, folder: Path, slot: int, over: Processes, words: Sequence[str]):
        self.folder, self.slot = folder, slot
        self.process = start(folder, over, words)
        self.bar = tqdm(desc=f"  {folder.name}: loading", position=slot, unit="step", leave=False, disable=None)

    def show(self) -> None:
        lines = losses(self.folder)
        if lines:
            step, total = lines[-1]["step"], lines[-1]["of"]
            self.bar.total, self.bar.n = total, step
            self.bar.set_description(f"  {self.folder.name}: {'scoring' if step == total else 'training'}")


class _Pool:
    """The running children. Leaving the context stops those that still run."""

    def __init__(self, over: Processes, words: Sequence[str]) -> None:
        self.over, self.words = over, words
        self.children: list[_Child] = []

    def __enter__(self) -> _Pool:
        return self

    def start(self, folder: Path, slot: int) -> None:
        self.children.append(_Child(folder, slot, self.over, self.words))

    def finished(self) -> list[_Child]:
        done = [child for child in self.children if child.process.poll() is not None]
        for child in self.children:
            child.show()
        for child in done:
            child.bar.close()
            self.children.remove(child)
        return done

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for child in self.children:
            child.process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + _GRACE_SECONDS
        for child in self.children:
            child.bar.close()
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
