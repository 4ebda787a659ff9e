"""Files that replace others atomically and survive a loss of power. Every function may raise OSError."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

# only these writers use such names, so any of them may remove a file whose writer is gone
_TEMPORARY = re.compile(r"\.uniproj-[0-9a-f]{16}\.part")
# how file systems say that a folder cannot be flushed, or not by this user
_NO_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def written(path: Path, content: bytes | Iterable[bytes | memoryview]) -> Iterator[Path]:
    """A temporary file beside `path` that holds the content, flushed to the disk, and is gone at the end.

    Its permissions are those of the file at `path`, or of any new file. Temporary files of killed writers are removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear(path.parent)
    part, descriptor = _temporary(path)
    try:
        with open(descriptor, "wb") as file:  # and with it the lock
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(descriptor)
            yield part
    finally:
        with suppress(OSError):
            part.unlink()


def install(parts: Mapping[Path, Path]) -> None:
    """Give each `written` file, a value, the place that is its key."""
    for path, part in parts.items():
        os.replace(part, path)
    for folder in {path.parent for path in parts}:
        flush_names(folder)


def flush_names(folder: Path) -> None:
    """Flush a folder and those above it, any of which may be new, so that the names in them survive a loss of power."""
    here = folder.resolve()
    for each in (here, *here.parents):
        try:
            descriptor = os.open(each, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno not in _NO_FLUSH:
                raise


def _temporary(path: Path) -> tuple[Path, int]:
    """A new file beside `path`, locked as long as its descriptor is open."""
    mode = _permissions(path)
    while True:
        part = path.with_name(f".uniproj-{secrets.token_hex(8)}.part")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(part, flags, 0o666 if mode is None else mode)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.fstat(descriptor).st_nlink > 0
        except BlockingIOError:
            ours = False
        except OSError:
            ours = True  # where a file system has no locks, nobody removes anything
        if ours:
            if mode is not None:
                with suppress(OSError):  # some file systems have one mode for all
                    os.fchmod(descriptor, mode)
            return part, descriptor
        os.close(descriptor)  # another writer removed it before it was locked


def _clear(folder: Path) -> None:
    """Remove the temporary files whose writer is gone, of whatever process, machine or container it was."""
    with suppress(OSError):
        for name in filter(_TEMPORARY.fullmatch, os.listdir(folder)):
            with suppress(OSError):
                _remove_unlocked(folder / name)


def _remove_unlocked(part: Path) -> None:
    if not stat.S_ISREG(part.lstat().st_mode):
        return
    # for writing: NFS locks no other
    descriptor = os.open(part, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        part.unlink()
    finally:
        os.close(descriptor)


def _permissions(path: Path) -> int | None:
    """Those of the regular file at `path`; None where there is none."""
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            return mode & 0o777
    return None
