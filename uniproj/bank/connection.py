"""A connection to the database of a bank, which may be forged, be replaced, or be written by other processes."""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from uniproj.bank.folder import RESTORE, identity, replaced
from uniproj.errors import AdapterError

Answer = TypeVar("Answer")

# seconds that a writer waits for the others
_PATIENCE = 60.0
# bytes of the longest value that is taken from a database or put into it
_LONGEST = 2**20
# prefixes of the names of SQLite's errors that refuse a write and leave the database intact
_REFUSED = (
    "SQLITE_BUSY",
    "SQLITE_FULL",
    "SQLITE_READONLY",
    "SQLITE_IOERR_WRITE",
    "SQLITE_IOERR_FSYNC",
    "SQLITE_IOERR_SHM",
)
_PRAGMAS = ("trusted_schema = OFF", "cell_size_check = ON", "synchronous = FULL")


class Connection:
    """One connection, opened at its first use, for one thread at a time.

    A process without write permission creates no files: it reads through the memory that a writer shares, or, while
    there is no writer, opens the database as immutable and checks after each query that it did not change.

    path: of the file itself, not of a link; opened: its identity; check: called with each new connection, before its
    first use. Raises AdapterError for whatever SQLite refuses, and for files that are replaced while they are open.
    """

    def __init__(
        self, path: Path, opened: tuple[int, int] | None, writable: bool, check: Callable[[sqlite3.Connection], None]
    ):
        self.lock = threading.RLock()
        self._path, self._file, self._check, self._may_write = path, opened, check, writable
        self._wal, self._shm, self._journal = (f"{path}{end}" for end in ("-wal", "-shm", "-journal"))
        self._connection: sqlite3.Connection | None = None
        self._mode = ""
        self._seen: tuple[object, ...] = ()

    def ask(self, question: Callable[[sqlite3.Connection], Answer], sure: bool = True) -> Answer:
        """The answer of a query; sure: asked again if the file was replaced or changed meanwhile."""
        with self.lock:
            try:
                while True:
                    connection = self._current()
                    try:
                        answer = question(connection)
                    except (sqlite3.Error, AdapterError):
                        if not self._stale():
                            raise
                    else:
                        if not sure or not self._stale():
                            return answer
                    self.close()
            except sqlite3.Error as error:
                raise self._refusal(error) from error

    @contextmanager
    def use(self) -> Iterator[sqlite3.Connection]:
        """The connection, for a transaction."""
        with self.lock:
            try:
                if self._mode != "rw":
                    self.close()  # permissions may have changed
                connection = self._current()
                self._stale()
                yield connection
                self._stale()
            except sqlite3.Error as error:
                raise self._refusal(error) from error

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def writable(self) -> bool:
        """Whether this process may write the database and files beside it."""
        return self._may_write and os.access(self._path, os.W_OK) and os.access(self._path.parent, os.W_OK)

    def _current(self) -> sqlite3.Connection:
        while self._connection is None:
            self._check_file()
            self._mode = self._allowed_mode()
            try:
                self._connection = self._connect()
            except sqlite3.OperationalError:
                # unless a writer has come or gone meanwhile
                if self._mode == self._allowed_mode():
                    raise
        return self._connection

    def _allowed_mode(self) -> str:
        for path in (self._path, self._wal, self._shm, self._journal):
            with suppress(FileNotFoundError):
                if not stat.S_ISREG(os.lstat(path).st_mode):
                    raise AdapterError(
                        f"bank: {path} must be a regular file, got a link, folder, pipe or device. {RESTORE}"
                    )
        if os.path.lexists(self._journal):
            # SQLite would undo what it says, and delete a file that it names
            raise AdapterError(f"bank: {self._journal} must not be there, since a bank never has one. {RESTORE}")
        if self.writable():
            return "rw"
        if os.path.exists(self._wal) and os.path.exists(self._shm):
            return "ro"
        if _size(self._wal):
            raise AdapterError(
                f"bank: {self._wal} must have {self._shm} beside it in a folder that may not be written, got none. "
                "Copy the folder to where it may be, or take a backup (AdapterBank.backup) of the bank itself."
            )
        return "ro&immutable=1"

    def _connect(self) -> sqlite3.Connection:
        before = self._now()
        # never rwc: a database that is missing is an error, not a new one
        connection = sqlite3.connect(
            f"{self._path.as_uri()}?mode={self._mode}",
            uri=True,
            timeout=_PATIENCE,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)
            for pragma in _PRAGMAS:
                connection.execute(f"PRAGMA {pragma}")
            self._check(connection)
            # the first use may create the -wal and -shm files
            self._seen = before if self._is_immutable() else self._now()
            self._check_file()
        except BaseException:
            connection.close()
            raise
        return connection

    def _check_file(self) -> None:
        # SQLite itself refuses a file that was never there
        if self._file is not None and identity(self._path) != self._file:
            raise replaced(self._path)

    def _is_immutable(self) -> bool:
        return self._mode not in ("rw", "ro")

    def _stale(self) -> bool:
        """Whether a file that was opened as immutable has changed. Raises AdapterError if another one was replaced."""
        if self._now() == self._seen:
            return False
        if self._is_immutable():
            return True
        raise replaced(self._path)

    def _now(self) -> tuple[object, ...]:
        if not self._is_immutable():
            return identity(self._path), identity(self._wal), identity(self._shm)
        try:
            found = os.stat(self._path)
        except OSError:
            return ()
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, _size(self._wal)

    def _refusal(self, error: sqlite3.Error) -> AdapterError:
        if getattr(error, "sqlite_errorname", "").startswith(_REFUSED):
            remedy = "Nothing saved before is lost: free some space, make it writable, or wait for another writer."
        else:
            remedy = f"See that it is there and may be read. {RESTORE}"
        return AdapterError(
            f"bank: {self._path} must be a database that can be read and written, got: {error}. {remedy}"
        )


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
