"""Runs on disk: one folder per configuration, and the one reader of them.

config.json decides the numbers, metrics.jsonl grows while the run trains, result.json is written last and
atomically: its presence means done.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pandas as pd

from experiments import record
from experiments.errors import ExperimentError
from uniproj.atomic import install, written

CONFIG, METRICS, RESULT = "config.json", "metrics.jsonl", "result.json"
RUNS = Path("runs")
# the folder of a run, with the hash of its configuration
NAMED = re.compile(r".+-([0-9a-f]{12})")
LOCK = ".lock"
# exit status of a run that another process trains (EX_TEMPFAIL)
BUSY = 75
# how the line begins in which a run says why it failed
FAILED = "failed: "


def digest(config: Mapping[str, Any]) -> str:
    """12 hex digits of the SHA-256 of a configuration; the order of its keys does not matter."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def slug(name: str) -> str:
    """A name as a part of a path: `glue/rte` is `glue-rte`, a folder is its last part."""
    last = Path(name).name if Path(name).exists() else name
    return re.sub(r"[^\w.]+", "-", last).strip("-")


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Names without the machine they come from: of an absolute path its last part, or as many as tell it from others.

    Names that are no absolute path stay as they are.
    """
    parts = {name: Path(name).parts if Path(name).is_absolute() else (name,) for name in names}

    def enough(name: str) -> str:
        for count in range(1, len(parts[name])):
            short = parts[name][-count:]
            if sum(other[-count:] == short for other in parts.values()) == 1:
                return "/".join(short)
        return "/".join(parts[name])

    return {name: enough(name) for name in parts}


def run_folder(runs: Path, config: Mapping[str, Any]) -> Path:
    """runs/<task>/<projection>-<hash of the configuration>."""
    return runs / slug(config["task"]) / f"{config['projection']}-{digest(config)}"


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failed write (full disk, no permission) into a sentence."""
    try:
        yield
    except OSError as error:
        raise ExperimentError(
            f"results: {path} must be writable, got {error.strerror or error}. Nothing saved before is lost: "
            "free some space or choose another folder, then run the same command again."
        ) from error


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of text in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file as a whole: a reader sees the old content or the new one, never a part."""
    with disk_errors(path), written(path, content) as part:
        install({path: part})


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON. Raises ExperimentError for NaN or infinity."""
    try:
        write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
    except ValueError as error:
        if isinstance(error, ExperimentError):
            raise
        raise ExperimentError(
            f"results: {path} must hold finite numbers, got NaN or infinity. Find what diverged, or lower --lr."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ExperimentError for a missing, truncated or foreign one, and for NaN."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ExperimentError(f"results: {path} must be a regular file, got a folder, pipe or device. Move it away.")
    try:
        value = json.loads(path.read_text(), parse_constant=_no_number)
    except OSError as error:
        raise ExperimentError(f"results: {path} must be readable, got {error.strerror}. Check the path.") from error
    except (ValueError, RecursionError) as error:
        raise ExperimentError(
            f"results: {path} must be whole JSON, got {error}. Move the file away and run the same command again."
        ) from error
    if not isinstance(value, dict):
        raise ExperimentError(f"results: {path} must hold one object, got a {type(value).__name__}. Move it away.")
    return value


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant}, which JSON does not have")


def prepare(runs: Path, config: Mapping[str, Any]) -> Path:
    """The folder of a run, with its config.json. Raises ExperimentError if another configuration lies there."""
    folder = run_folder(runs, config)
    if (folder / CONFIG).exists():
        check_config(folder, config)
    else:
        write_json(folder / CONFIG, config)
    return folder


def is_done(folder: Path) -> bool:
    """Whether the run has finished. Raises ExperimentError if its result is damaged, as in `result`."""
    return (folder / RESULT).exists() and bool(result(folder))


def damage(folder: Path) -> str | None:
    """What is wrong with the result of a run, in a sentence; None where it is in order, or not there yet."""
    try:
        is_done(folder)
    except ExperimentError as error:
        return str(error)
    return None


def result(folder: Path) -> dict[str, Any]:
    """The result of a finished run.

    Raises ExperimentError for a damaged one, and for one that cannot be this run's: whose configuration is not the one
    that the folder is named after and config.json holds, or whose score its metric does not have.
    """
    found = read_json(folder / RESULT)
    with as_written(folder / RESULT, "the folder"):
        record.check(found)
        # a copy may bear another name
        named, own = NAMED.fullmatch(folder.resolve().name), digest(found["config"])
        if named and named[1] != own:
            raise ExperimentError(f"config must be the one whose hash the folder bears, got {own}.")
    if (folder / CONFIG).exists():
        check_config(folder, found["config"])
    return found


@contextmanager
def as_written(path: Path, what: str) -> Iterator[None]:
    """Say of an error that a file is not what a program wrote, and `what` to move away."""
    try:
        yield
    except ExperimentError as error:
        raise ExperimentError(
            f"results: {path} must be as it was written: {str(error).removesuffix(' Correct the value.')} It was "
            f"edited or damaged: move {what} away and run the same command again."
        ) from error


def check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises ExperimentError if the config.json of a run holds another configuration."""
    if digest(read_json(folder / CONFIG)) != digest(config):
        raise ExperimentError(
            f"results: {folder / CONFIG} must hold the configuration its folder is named after, got another. "
            "It was edited: move the folder away and run the same command again."
        )


def lock(folder: Path) -> IO[str] | None:
    """The lock of a run, held as long as the file is open and the process lives; None if another process has it."""
    # nothing is written: the file may be a link, or another program's
    with disk_errors(folder / LOCK):
        file = os.fdopen(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
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


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The logged lines up to the first one that is none: cut off by an interruption, or damaged by a power cut."""
    path = folder / METRICS
    lines = path.read_text(errors="replace").split("\n")[:-1] if path.is_file() else []
    found = []
    for line in lines:
        if (logged := _logged(line)) is None:
            break
        found.append(logged)
    return found


def _logged(line: str) -> dict[str, Any] | None:
    """A line of `callbacks.MetricsLog`, or None."""
    try:
        found = json.loads(line)
        is_whole = isinstance(found["step"], int) and isinstance(found["of"], int)
        return found if is_whole and (found["loss"] is None or math.isfinite(found["loss"])) else None
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
        return None


def load(folder: str | Path) -> pd.DataFrame:
    """Every finished run below a folder, one row each: configuration and result side by side, and `folder`.

    Raises ExperimentError for a missing folder or a damaged result.json.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ExperimentError(f"results: {folder} must be a folder, got none. Run `make compare` first.")
    return load_runs(path.parent for path in sorted(folder.rglob(RESULT)))


def load_runs(folders: Iterable[Path]) -> pd.DataFrame:
    """The rows of these finished runs, as in `load`."""
    return pd.DataFrame([row(folder) for folder in folders])


def row(folder: Path) -> dict[str, Any]:
    """One finished run: configuration and result side by side, and `folder`; absent numbers are None."""
    found = result(folder)
    return {**found.pop("config"), **found, "folder": str(folder)}
