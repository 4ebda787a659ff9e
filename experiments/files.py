"""Files that are written as a whole and read with a sentence for what is wrong, and the names given to them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from experiments.errors import ExperimentError
from uniproj.atomic import install, written


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


def digest(config: Mapping[str, Any]) -> str:
    """12 hex digits of the SHA-256 of a configuration; the order of its keys does not matter."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hex digits; it is never whole in memory."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def open_lock(path: Path) -> IO[str]:
    """A file to be locked, made if there is none. No link is followed, and nothing written to what others may own."""
    with disk_errors(path):
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")


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
