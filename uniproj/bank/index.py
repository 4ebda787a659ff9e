"""Which slot holds which name: a small SQLite database, whose transactions make every change whole."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakSet

from uniproj.errors import AdapterError

# version: never given twice, so an entry that is found again with its version was in place all the time
_TABLES = """
CREATE TABLE adapters (
    version INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    slot INTEGER NOT NULL UNIQUE,
    crc INTEGER NOT NULL
);
CREATE TABLE free (slot INTEGER PRIMARY KEY);
INSERT INTO free VALUES (0);
"""
# seconds that a writer waits for the others
_PATIENCE = 60.0
# how the names of errors begin that refuse a write and leave the database whole
_REFUSED = (
    "SQLITE_BUSY",
    "SQLITE_FULL",
    "SQLITE_READONLY",
    "SQLITE_IOERR_WRITE",
    "SQLITE_IOERR_FSYNC",
    "SQLITE_IOERR_SHM",
)


@dataclass(frozen=True)
class Entry:
    """Where the numbers of a name lie, and their CRC-32."""

    version: int
    slot: int
    crc: int


class Index:
    """name -> slot, and the slots that no name uses.

    SQLite in write-ahead mode: readers wait for nobody, the lock of a writer dies with its process, and a commit is on
    the disk before it returns. One connection reads and another writes, so that the threads of a process do not wait
    for each other's writes either; both are closed before a fork, which a connection does not survive.

    Raises AdapterError for a database that cannot be read or written.
    """

    def __init__(self, path: Path):
        self.path = path
        self._reading, self._writing = _Connection(path), _Connection(path)
        _open.add(self)

    @classmethod
    def create(cls, path: Path) -> None:
        """A new database with the one free slot of a new file."""
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.executescript(_TABLES)
        connection.close()

    def find(self, name: str) -> Entry | None:
        """The entry of a name."""
        with self._reading.use() as connection:
            row = connection.execute("SELECT version, slot, crc FROM adapters WHERE name = ?", (name,)).fetchone()
        return None if row is None else Entry(*row)

    def names(self) -> list[str]:
        """Every name, sorted."""
        with self._reading.use() as connection:
            return [name for (name,) in connection.execute("SELECT name FROM adapters ORDER BY name")]

    def count(self) -> int:
        """How many names there are."""
        with self._reading.use() as connection:
            return int(connection.execute("SELECT count(*) FROM adapters").fetchone()[0])

    def slots(self) -> int:
        """Slots that are used or free."""
        with self._reading.use() as connection:
            return _slots(connection)

    @contextmanager
    def change(self) -> Iterator[Change]:
        """One transaction: all of it happens, or nothing. Only one at a time, over all processes."""
        with self._writing.use() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield Change(connection)
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    def close(self) -> None:
        """Let go of the files; the next use opens them again."""
        for connection in (self._reading, self._writing):
            with connection.lock:
                connection.close()


class Change:
    """What a writer does within one transaction."""

    def __init__(self, connection: sqlite3.Connection):
        self._connection = connection

    def free(self, count: int) -> list[int]:
        """The first free slots, at most `count`."""
        return [slot for (slot,) in self._connection.execute("SELECT slot FROM free ORDER BY slot LIMIT ?", (count,))]

    def slots(self) -> int:
        """Slots that are used or free."""
        return _slots(self._connection)

    def add_free(self, slots: Sequence[int]) -> None:
        """Enter slots that the file has and the index does not know."""
        self._connection.executemany("INSERT INTO free VALUES (?)", [(slot,) for slot in slots])

    def remove(self, name: str) -> bool:
        """Forget a name and free its slot; False if there is none."""
        freed = self._connection.execute("DELETE FROM adapters WHERE name = ? RETURNING slot", (name,)).fetchall()
        self._connection.executemany("INSERT INTO free VALUES (?)", freed)
        return bool(freed)

    def put(self, name: str, slot: int, crc: int) -> None:
        """Let a name use a free slot."""
        self._connection.execute("DELETE FROM free WHERE slot = ?", (slot,))
        self._connection.execute("INSERT INTO adapters (name, slot, crc) VALUES (?, ?, ?)", (name, slot, crc))


def _slots(connection: sqlite3.Connection) -> int:
    # over the two indices, so in no time that grows with the count of adapters
    last = connection.execute("SELECT (SELECT max(slot) FROM adapters), (SELECT max(slot) FROM free)").fetchone()
    return 1 + max(-1 if slot is None else int(slot) for slot in last)


class _Connection:
    """One connection, opened at its first use, for one thread at a time."""

    def __init__(self, path: Path):
        self._path, self.lock = path, threading.RLock()
        self._connection: sqlite3.Connection | None = None

    @contextmanager
    def use(self) -> Iterator[sqlite3.Connection]:
        with self.lock:
            try:
                if self._connection is None:
                    self._connection = self._connect()
                yield self._connection
            except sqlite3.Error as error:
                if getattr(error, "sqlite_errorname", "").startswith(_REFUSED):
                    remedy = (
                        "Nothing saved before is lost: free some space, make it writable, or wait for another writer."
                    )
                else:
                    remedy = "See that it is there and may be read, or bring the whole folder back from a copy."
                raise AdapterError(
                    f"bank: {self._path} must be a database that can be read and written, got: {error}. {remedy}"
                ) from error

    def _connect(self) -> sqlite3.Connection:
        # rw: a database that is missing is an error, not a new one
        connection = sqlite3.connect(
            f"{self._path.absolute().as_uri()}?mode=rw",
            uri=True,
            timeout=_PATIENCE,
            isolation_level=None,
            check_same_thread=False,
        )
        connection.execute("PRAGMA synchronous=FULL")
        return connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


_open: WeakSet[Index] = WeakSet()
_held: list[_Connection] = []


def _before_fork() -> None:
    for index in list(_open):
        for connection in (index._reading, index._writing):
            connection.lock.acquire()
            connection.close()
            _held.append(connection)


def _after_fork() -> None:
    while _held:
        _held.pop().lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
