"""Files read whole and replaced whole."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from uniproj import limits
from uniproj.atomic import install, written
from uniproj.errors import AdapterError
from uniproj.format.schema import parse_json


def exists(path: Path) -> bool:
    """Whether the path exists; no for a name that the system cannot look up."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """A regular file. Raises AdapterError for a folder, pipe, device or missing file, and never blocks on one."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe may have no writer
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise AdapterError(f"{path}: must be a regular file, got a folder, pipe or device. Check the path.")
        with os.fdopen(descriptor, "rb") as file:
            yield file
    except OSError as error:
        raise AdapterError(
            f"{path}: must be a readable file, got {error.strerror or error}. Check the path."
        ) from error


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises AdapterError for one that cannot be read, is not JSON, or exceeds `limits`."""
    with opened(path) as file:
        limits.check("config_bytes", os.fstat(file.fileno()).st_size, "its bytes", str(path))
        text = file.read(limits.config_bytes)
    try:
        return parse_json(text)
    except ValueError as error:
        raise AdapterError(f"{path}: must be JSON, got {error}. Copy or download it again.") from None


def replace(contents: Mapping[Path, bytes | Iterable[bytes | memoryview]]) -> None:
    """Replace files that belong together; each is then the old one or the new one, never a part of it.

    All are written under other names and flushed to the disk before the first takes its place, so a full disk or a
    crash while writing leaves every old file as it was. Raises AdapterError where the disk refuses.
    """
    first = next(iter(contents))
    with ExitStack() as temporary:
        with _disk_errors(first, "What was saved there before is intact"):
            parts = {path: temporary.enter_context(written(path, content)) for path, content in contents.items()}
        with _disk_errors(first, "Each file there is whole, the old one or the new one"):
            install(parts)


@contextmanager
def _disk_errors(path: Path, state: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AdapterError(
            f"{path}: must be writable, got {error.strerror or error}. {state}: free some space or choose another "
            "folder, then save again."
        ) from error
