"""A copy of a bank as it is at one moment, while others write it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np

from uniproj.bank.index import Entry, Index, last_change, used_slots
from uniproj.bank.slots import Slots, crc
from uniproj.errors import AdapterError

# moments that one who cannot keep writers waiting tries
_TURNS = 100


def copy(index: Index, slots: Slots, to_index: Path, to_slots: Path) -> None:
    """Copy the index as it is at one moment, and all vectors that it names, each with its CRC-32 compared.

    A vector whose slot was written anew after that moment is missing, so a later moment is taken, and what came since
    is copied. Who may write the bank keeps the writers waiting for that; who may not goes on until nothing is missing.
    Raises AdapterError for a vector that is damaged, and for a bank that is written faster than it is copied.
    """
    target, last = Slots.create(to_slots, slots.d, slots.metadata), 0
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
        f"bank: {slots.path} must be written more slowly than it is copied by one who may not write it, got {missing} "
        f"changed in each of {_TURNS} turns. Let its owner take the backup."
    )


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
