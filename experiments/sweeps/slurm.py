"""Many runs on SLURM: submitit submits arrays in waves below a cap; a time limit or preemption requeues and resumes."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import submitit
from submitit.helpers import DelayedSubmission

from experiments.errors import ExperimentError
from experiments.files import read_json, write_json
from experiments.models import trust
from experiments.processes import Processes
from experiments.records import damage, is_done
from experiments.runs import tracking
from experiments.sweeps.workers import last_words, start
from uniproj.console import DONE, Progress

JOBS = "jobs.json"
POLL_SECONDS = 5.0
_TIME_IS_UP = signal.Signals[f"SIG{submitit.JobEnvironment.USR_SIG}"]


@dataclass(frozen=True)
class SlurmOptions:
    """`launcher.slurm` of a sweep.

    parameters: those of submitit's SlurmExecutor, such as time (minutes), partition, mem, cpus_per_task, gpus_per_node,
    account, qos, nodes. concurrency: runs that run at once. queue_cap: our runs in the queue at once, waiting or
    running; the next array is submitted when the queue is empty of them, since SLURM caps what runs within one array.
    processes: of each run on each of its nodes; more than one in all are started by torchrun. sharded: the frozen base
    is split over them. restarts: after how many time limits a run is given up.
    """

    parameters: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 8
    queue_cap: int = 100
    processes: int = 1
    sharded: bool = False
    restarts: int = 100


class _Job:
    """What runs on each node of an allocation: one run as a child, told to write a checkpoint when time is up."""

    def __init__(self, over: Processes, words: Sequence[str]):
        self.over, self.words = over, words

    def __call__(self, folder: str) -> int:
        # SLURM sends the signal to every process of the job: the run inherits it blocked, and is told by `checkpoint`
        signal.pthread_sigmask(signal.SIG_BLOCK, {_TIME_IS_UP})
        self._child = start(Path(folder), self._here(), self.words)
        # a thread waits: the signal handler that calls `checkpoint` may wait again, which Popen.wait itself cannot
        self._waiter = threading.Thread(target=self._child.wait)
        self._waiter.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {_TIME_IS_UP})
        while self._waiter.is_alive():
            self._waiter.join(POLL_SECONDS)
        return self._child.returncode

    def _here(self) -> Processes:
        if self.over.nodes == 1:
            return self.over
        first = submitit.helpers.TorchDistributedEnvironment()
        return replace(self.over, node=first.rank, address=f"{first.master_addr}:{first.master_port}")

    def checkpoint(self, folder: str) -> DelayedSubmission:
        """Called by submitit on a time limit or preemption: the run is requeued and goes on from its checkpoint."""
        self._child.terminate()
        self._waiter.join()
        return DelayedSubmission(_Job(self.over, self.words), folder)


def train_all(
    folders: Sequence[Path], options: SlurmOptions, logs: Path, report_to: Sequence[str] = ()
) -> dict[Path, str]:
    """Train every run that is not done; returns the reason of each failure.

    Runs that an earlier launcher left in the queue are waited for, not submitted again. KeyboardInterrupt leaves the
    queue as it is. logs: folder, seen by all nodes, of submitit's files and of the list of jobs.
    """
    known = read_json(logs / JOBS) if (logs / JOBS).exists() else {}
    mine: set[Path] = set()
    failures = {folder: said for folder in folders if (said := damage(folder))}
    told = {folder for folder in folders if folder not in failures and is_done(folder)}
    with Progress("run", len(folders), len(told)) as progress:
        while True:
            queued = _queued()
            live = {folder for folder in folders if known.get(str(folder)) in queued}
            done = {folder for folder in folders if folder not in failures and is_done(folder)}
            for folder in (mine - live - done) - set(failures):
                failures[folder] = last_words(folder)
            waiting = [f for f in dict.fromkeys(folders) if f not in live | done | set(failures)]
            for folder in (done | set(failures)) - told:
                progress.ended(str(folder), "failed" if folder in failures else DONE)
                told.add(folder)
            progress.bar.set_postfix(queued=len(live), waiting=len(waiting), failed=len(failures))
            if not live and not waiting:
                return failures
            if waiting and not live:
                wave = waiting[: options.queue_cap]
                known |= _submit(wave, options, logs, [*trust.words(), *tracking.words(report_to)])
                write_json(logs / JOBS, known)
                mine |= set(wave)
            time.sleep(POLL_SECONDS)


def _submit(wave: Sequence[Path], options: SlurmOptions, logs: Path, words: Sequence[str]) -> dict[str, str]:
    """One array of runs that are started with these words; returns the job id of each run."""
    try:
        executor = submitit.SlurmExecutor(folder=logs.resolve(), max_num_timeout=options.restarts)
        executor.update_parameters(
            **{
                "job_name": "uniproj",
                "signal_delay_s": 60,
                **options.parameters,
                "array_parallelism": options.concurrency,
            }
        )
        over = Processes(options.processes, options.sharded, nodes=int(options.parameters.get("nodes", 1)))
        with executor.batch():
            jobs = [executor.submit(_Job(over, words), str(folder.resolve())) for folder in wave]
    except (RuntimeError, ValueError, submitit.core.utils.FailedJobError) as error:
        raise ExperimentError(
            f"slurm: sbatch must accept launcher.slurm.parameters, got: {error}. Correct them."
        ) from error
    return {str(folder): job.job_id for folder, job in zip(wave, jobs, strict=True)}


def _queued() -> set[str]:
    """Ids of this user's jobs that wait or run, arrays spelled out."""
    command = ["squeue", "--me", "--array", "--noheader", "--format=%i"]
    try:
        return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or error
        raise ExperimentError(
            f"slurm: squeue must answer on this machine, got: {reason}. Start from a login node."
        ) from error
