"""Which slot holds which name: a small SQLite database, whose transactions make every change whole."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

from uniproj.bank.connection import Connection
from uniproj.bank.folder import RESTORE, identity
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


def _schema(connection: sqlite3.Connection, most: int = -1) -> set[tuple[object, ...]]:
    return set(connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master LIMIT ?", (most,)))


with closing(sqlite3.connect(":memory:")) as _ours:
    _ours.executescript(_TABLES)
    _SCHEMA = _schema(_ours)


@dataclass(frozen=True)
class Entry:
    """Where the numbers of a name lie, and their CRC-32."""

    version: int
    slot: int
    crc: int

    @classmethod
    def of(cls, row: Sequence[object]) -> Entry:
        """Raises AdapterError for a row that no bank has written."""
        return cls(*map(_integer, row))


class Index:
    """name -> slot, and the slots that no name uses.

    SQLite in write-ahead mode: readers wait for nobody, the lock of a writer dies with its process, and a commit is on
    the disk before it returns. One connection reads, another writes and a third copies, so that the threads of a
    process do not wait for each other either; all are closed before a fork, which a connection does not survive.

    least: the number of the last change that is known to be committed. Raises AdapterError for a database that cannot
    be read or written, has other tables, ends before that change, or is replaced while it is open.
    """

    def __init__(self, path: Path, least: Callable[[], int]):
        # through a link, which may lead to the database of another bank, nothing is written
        self.path, own = path.resolve(), not path.is_symlink()
        self._least, opened = least, identity(self.path)
        self._writing, self._reading, self._copying = (
            Connection(self.path, opened, own, self._check) for _ in range(3)
        )
        with _forking:
            _open.add(self)

    @classmethod
    def create(cls, path: Path) -> None:
        """A new database with the one free slot of a new file."""
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.executescript(_TABLES)

    def find(self, name: str, sure: bool = True) -> Entry | None:
        """The entry of a name; sure: see `Connection.ask`."""
        row = self._row("SELECT version, slot, crc FROM adapters WHERE name = ?", name, sure)
        return None if row is None else Entry.of(row)

    def names(self, most: int) -> list[str]:
        """Names in their order, `most` of them at most."""
        rows = self._reading.ask(
            lambda c: c.execute("SELECT name FROM adapters ORDER BY name LIMIT ?", (most,)).fetchall()
        )
        if wrong := [name for (name,) in rows if type(name) is not str]:
            raise AdapterError(f"bank: {self.path} must hold names of text, got {wrong[0]!r:.40}. {RESTORE}")
        return [name for (name,) in rows]

    def count(self, most: int) -> int:
        """How many names there are; not counted further than to `most`."""
        return int(self._row("SELECT count(*) FROM (SELECT 1 FROM adapters LIMIT ?)", most)[0])

    def slots(self) -> int:
        """Slots that are used or free."""
        return self._reading.ask(used_slots)

    def holds(self, version: int) -> bool:
        """Whether the entry of this version is still in place."""
        return self._row("SELECT 1 FROM adapters WHERE version = ?", version) is not None

    def _row(self, query: str, value: object, sure: bool = True) -> Any:
        return self._reading.ask(lambda c: c.execute(query, (value,)).fetchone(), sure)

    def writable(self) -> bool:
        """Whether this process may write it."""
        return self._writing.writable()

    @contextmanager
    def change(self) -> Iterator[Change]:
        """One transaction: all of it happens, or nothing. Only one at a time, over all processes.

        No code of a caller may run within it: it could wait for a fork, which waits for the transaction.
        """
        with self._writing.use() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield Change(connection)
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    def copy(self, path: Path) -> None:
        """Write the database as it is at one moment to a file, in place of what is there."""

        def copy_pages(connection: sqlite3.Connection) -> None:
            with closing(sqlite3.connect(path)) as target:
                connection.backup(target)

        # a connection that is open already knows whether the files are those that were opened
        self.slots()
        self._copying.ask(copy_pages)

    def close(self) -> None:
        """Close the files; the next use opens them again."""
        for connection in self._connections():
            with connection.lock:
                connection.close()

    def _connections(self) -> tuple[Connection, ...]:
        # the order of locks: while it writes a thread may read or copy, never the reverse, so there is no deadlock
        return self._writing, self._reading, self._copying

    def _check(self, connection: sqlite3.Connection) -> None:
        # before the database is asked, since writers go on
        least = self._least()
        # a view, a trigger or a column of another kind could run code, or never end
        if (found := _schema(connection, len(_SCHEMA) + 1)) != _SCHEMA:
            other = sorted(str(row[1]) for row in found ^ _SCHEMA)
            raise AdapterError(
                f"bank: {self.path} must hold the tables of a bank and nothing else, got other {other!s:.80}. {RESTORE}"
            )
        if (known := last_change(connection)) < least:
            raise AdapterError(
                f"bank: {self.path} must hold change {least}, as the vectors beside it do, got one that ends with "
                f"change {known}: it was copied without {self.path.name}-wal while the bank was open, or that file is "
                f"gone. Copy a bank with AdapterBank.backup. {RESTORE}"
            )


class Change:
    """What a writer does within one transaction."""

    def __init__(self, connection: sqlite3.Connection):
        self._connection = connection

    def free(self, count: int) -> list[int]:
        """The first free slots, at most `count`."""
        return [slot for (slot,) in self._connection.execute("SELECT slot FROM free ORDER BY slot LIMIT ?", (count,))]

    def slots(self) -> int:
        """Slots that are used or free."""
        return used_slots(self._connection)

    def last(self) -> int:
        """The last change, this one included."""
        return last_change(self._connection)

    def add_free(self, slots: Sequence[int]) -> None:
        """Enter slots that the file has and the index does not know."""
        self._connection.executemany("INSERT INTO free VALUES (?)", [(slot,) for slot in slots])

    def remove(self, name: str) -> bool:
        """Forget a name and free its slot; False if there is none."""
        freed = self._connection.execute("DELETE FROM adapters WHERE name = ? RETURNING slot", (name,)).fetchall()
        self._connection.executemany("INSERT INTO free VALUES (?)", freed)
        if freed:
            # counts as a change even if no insert follows
            self._connection.execute("UPDATE sqlite_sequence SET seq = seq + 1 WHERE name = 'adapters'")
        return bool(freed)

    def put(self, name: str, slot: int, crc: int) -> None:
        """Let a name use a free slot."""
        self._connection.execute("DELETE FROM free WHERE slot = ?", (slot,))
        self._connection.execute("INSERT INTO adapters (name, slot, crc) VALUES (?, ?, ?)", (name, slot, crc))


def last_change(connection: sqlite3.Connection) -> int:
    """The number of the last change, an insert or a deletion; 0 before the first."""
    row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'adapters' LIMIT 1").fetchone()
    return 0 if row is None else _integer(row[0])


def used_slots(connection: sqlite3.Connection) -> int:
    """How many slots there are, used or free."""
    # over the two indices, so in no time that grows with the count of adapters
    last = connection.execute("SELECT (SELECT max(slot) FROM adapters), (SELECT max(slot) FROM free)").fetchone()
    return 1 + max(-1 if slot is None else _integer(slot) for slot in last)


def _integer(value: object) -> int:
    if type(value) is not int:
        raise AdapterError(f"bank: the index must hold whole numbers, got {value!r:.40}. {RESTORE}")
    return value


_forking = threading.RLock()
_open: WeakSet[Index] = WeakSet()
_held: list[Connection] = []


def _before_fork() -> None:
    _forking.acquire()
    for index in list(_open):
        for connection in index._connections():
            connection.lock.acquire()
            connection.close()
            _held.append(connection)


def _after_fork() -> None:
    while _held:
        _held.pop().lock.release()
    _forking.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
