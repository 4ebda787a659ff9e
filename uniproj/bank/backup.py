"""A copy of a bank as it is at one moment, while others write it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np

from uniproj.bank.index import Entry, Index, last_change, used_slots
from uniproj.bank.slots import Slots, crc
from uniproj.errors import AdapterError

# attempts of a process that cannot lock writers out
_TURNS = 100


def copy(index: Index, slots: Slots, to_index: Path, to_slots: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Copy the index as it is at one moment, and all vectors that it names, each with its CRC-32 compared.

    A slot may be overwritten after that moment, and its vector is then missing. So the index is copied once more, and
    the vectors that changed since with it. A process that may write the bank locks other writers out for this second
    pass; one that may only read repeats it until nothing is missing. metadata: of the copy, where it is another. Raises
    AdapterError for a vector that is damaged, and for a bank that is written faster than it is copied.
    """
    target, last = Slots.create(to_slots, slots.d, metadata or slots.metadata), 0
    for turn in range(_TURNS):
        with index.change() if turn and index.writable() else nullcontext():
            index.copy(to_index)
            missing: list[str] = []
            with closing(sqlite3.connect(f"{to_index.as_uri()}?mode=ro&immutable=1", uri=True)) as copied:
                target.reserve(used_slots(copied))
                # the last first, since they are the next to change
                rows = copied.execute(
                    "SELECT name, version, slot, crc FROM adapters WHERE version > ? ORDER BY version DESC", (last,)
                )
                target.write(_vectors(rows, index, slots, missing))
                last = last_change(copied)
            slots.check()
        if not missing:
            target.note(last)
            return
    raise AdapterError(
        f"bank: {slots.path} must be written more slowly than it can be copied without write permission, got {missing} "
        f"changed during the last of {_TURNS} attempts. Make the backup as a user who may write the bank."
    )


def forget_deleted(index: Path) -> None:
    """Leave nothing of deleted names in the free pages of a copied index."""
    with closing(sqlite3.connect(index)) as connection:
        connection.execute("VACUUM")


def _vectors(rows: sqlite3.Cursor, index: Index, slots: Slots, missing: list[str]) -> Iterator[tuple[int, np.ndarray]]:
    for name, *place in rows:
        entry = Entry.of(place)
        row = slots.read(entry.slot)
        if crc(row) == entry.crc:
            yield entry.slot, row
        elif index.holds(entry.version):
            raise slots.altered(name)
        else:
            missing.append(name)
