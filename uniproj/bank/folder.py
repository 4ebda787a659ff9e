"""The folder of a bank: it appears whole or not at all, and its files are those that were opened."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from uniproj.atomic import flush_names
from uniproj.errors import AdapterError

RESTORE = "Bring the whole folder back from a backup (AdapterBank.backup)."
_UNFINISHED = ".unfinished"


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """Turns an OSError into an AdapterError that names the folder and the remedy."""
    try:
        yield
    except OSError as error:
        raise refusal(folder, error) from error


def refusal(folder: Path, error: OSError) -> AdapterError:
    """The AdapterError for an OSError."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        remedy = f"Check the path. {RESTORE}"
    else:
        remedy = "Nothing saved before is lost: check the path, or free some space, and try again."
    return AdapterError(f"bank: {folder} must be a folder that can be read and written, got: {error}. {remedy}")


def identity(path: str | Path) -> tuple[int, int] | None:
    """(device, inode) of the file at a path, which no other file has while it is open; None without a file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def replaced(path: str | Path) -> AdapterError:
    """The error for a file that was replaced or deleted while the bank was open."""
    return AdapterError(
        f"bank: {path} must be the file that was opened, got another in its place, or none. "
        "Open the bank again with AdapterBank(folder), and write again what was written since."
    )


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill, flushed and renamed to `folder` when the block ends; deleted after an error.

    A lock that ends with the process marks it as in use, so that what killed processes left can be deleted. Raises
    AdapterError if `folder` exists already.
    """
    with disk(folder):
        if os.path.lexists(folder):
            raise AdapterError(
                f"bank: {folder} must not exist yet, got one. Open it with AdapterBank(folder), or choose another path."
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear(folder)
        part, lock = _claim(folder)
    try:
        yield part
        with disk(folder):
            flush_names(part)
            part.rename(folder)
            flush_names(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        os.close(lock)


def _claim(folder: Path) -> tuple[Path, int]:
    """A new temporary folder beside the final one, and the lock that marks it as in use."""
    while True:
        part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{_UNFINISHED}")
        part.mkdir()
        # before it was locked, another process may have deleted it as a leftover
        with suppress(BlockingIOError, FileNotFoundError):
            lock = _lock(part)
            if part.exists():
                return part, lock
            os.close(lock)


def _clear(folder: Path) -> None:
    with suppress(OSError):
        for left in folder.parent.iterdir():
            if left.name.startswith(f".{folder.name}.") and left.name.endswith(_UNFINISHED):
                # a locked one is in use, and one of another user is not ours to delete
                with suppress(OSError):
                    lock = _lock(left)
                    shutil.rmtree(left, ignore_errors=True)
                    os.close(lock)


def _lock(folder: Path) -> int:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
