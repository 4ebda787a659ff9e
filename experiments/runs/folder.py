"""The folder of a run, named after its configuration: what lies there, and who may write into it.

config.json decides the numbers, metrics.jsonl grows while the run trains, result.json is written last and
atomically: its presence means done.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from experiments.errors import ExperimentError
from experiments.files import digest, open_lock, read_json, slug, write_json

CONFIG, LOSSES, RESULT = "config.json", "metrics.jsonl", "result.json"
RUNS = Path("runs")
# the folder of a run, with the hash of its configuration
NAMED = re.compile(r".+-([0-9a-f]{12})")
LOCK = ".lock"
# exit status of a run that another process trains (EX_TEMPFAIL)
BUSY = 75
# how the line begins in which a run says why it failed
FAILED = "failed: "


def run_folder(runs: Path, config: Mapping[str, Any]) -> Path:
    """runs/<task>/<projection>-<hash of the configuration>."""
    return runs / slug(config["task"]) / f"{config['projection'].replace('/', '-')}-{digest(config)}"


def prepare(runs: Path, config: Mapping[str, Any]) -> Path:
    """The folder of a run, with its config.json. Raises ExperimentError if another configuration lies there."""
    folder = run_folder(runs, config)
    if (folder / CONFIG).exists():
        check_config(folder, config)
    else:
        write_json(folder / CONFIG, config)
    return folder


def check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises ExperimentError if the config.json of a run holds another configuration."""
    if digest(read_json(folder / CONFIG)) != digest(config):
        raise ExperimentError(
            f"results: {folder / CONFIG} must hold the configuration its folder is named after, got another. "
            "It was edited: move the folder away and run the same command again."
        )


def lock(folder: Path) -> IO[str] | None:
    """The lock of a run, held as long as the file is open and the process lives; None if another process has it."""
    file = open_lock(folder / LOCK)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def is_locked(folder: Path) -> bool:
    """Whether a process trains this run now; one whose lock is missing, a link or not to be read is free.

    Nothing is written.
    """
    try:
        # a pipe would be waited for
        file = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False
