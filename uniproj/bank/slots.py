"""theta_d of many adapters in one file: a memory-mapped safetensors tensor that grows in place."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from uniproj.errors import AdapterError

# bytes of the number with which a safetensors file begins: the length of its header
_LENGTH = 8
_PAGE = 4096
TENSOR = "theta_d"
# a file grows by this part of itself at least, so that few writes have to wait for it
_GROWTH = 32


class Slots:
    """`theta_d` (slots, d) float32 in a safetensors file of one tensor, whose header leaves its length as it grows.

    Readers map the file and copy single slots; one writer at a time (the caller sees to that) fills slots which nobody
    reads. The count of slots is that of the file's size: the one in the header follows it, for other programs, and is
    set right by the next writer if a crash came between the two.

    Raises AdapterError for a file that is no such tensor.
    """

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            length = file.read(_LENGTH)
            self._start = _LENGTH + struct.unpack("<Q", length)[0] if len(length) == _LENGTH else 0
            # a foreign length may be anything, so no more is read than the file can hold
            text = file.read(max(0, min(self._start, path.stat().st_size) - _LENGTH))
        try:
            header = json.loads(text)
            dtype, self.d = header[TENSOR]["dtype"], int(header[TENSOR]["shape"][1])
            self.metadata: dict[str, str] = header["__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise self._foreign(f"{type(error).__name__}: {error}") from None
        if set(header) != {TENSOR, "__metadata__"} or dtype != "F32" or self.d < 1 or self._start % _PAGE:
            raise self._foreign(f"tensors {sorted(header)}, {dtype}")
        self._map()

    @classmethod
    def create(cls, path: Path, d: int, metadata: Mapping[str, str]) -> Slots:
        """A new file with one empty slot."""
        rest = f'"__metadata__":{json.dumps(dict(metadata))}}}'.encode()
        pad = -(_LENGTH + len(_shape(d, 1)) + len(rest)) % _PAGE
        header = _shape(d, 1) + rest + b" " * pad
        with path.open("xb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(_LENGTH + len(header) + 4 * d)
            _to_disk(file)
        return cls(path)

    def __len__(self) -> int:
        """Slots in the file now."""
        return (self.path.stat().st_size - self._start) // (4 * self.d)

    def read(self, slot: int) -> np.ndarray:
        """A copy of one slot, (d,) float32."""
        if slot >= len(self._rows):
            self._map()
        return np.array(self._rows[slot])

    def write(self, rows: Iterable[tuple[int, np.ndarray]]) -> None:
        """Fill slots and wait until the disk has them."""
        with self.path.open("r+b") as file:
            for slot, row in rows:
                file.seek(self._end(slot))
                file.write(np.ascontiguousarray(row, dtype="<f4").data)
            _to_disk(file)

    def reserve(self, slots: int) -> int:
        """Make room for this many slots, or for 1/32 more than there are, and say how many there are then.

        New slots are holes: a disk without room for them refuses when they are written.
        """
        before = len(self)
        after = before if slots <= before else max(slots, before + before // _GROWTH)
        shape = _shape(self.d, after)
        with self.path.open("r+b") as file:
            file.seek(_LENGTH)
            if after == before and file.read(len(shape)) == shape:
                return after
            # also where a crash left a part of a slot
            os.ftruncate(file.fileno(), self._end(after))
            # of a fixed length and within the first page, so that it is written whole
            file.seek(_LENGTH)
            file.write(shape)
            _to_disk(file)
        return after

    def _end(self, slots: int) -> int:
        return self._start + 4 * self.d * slots

    def _map(self) -> None:
        if len(self) < 1:
            raise self._foreign("a file without a whole slot")
        self._rows = np.memmap(self.path, dtype="<f4", mode="r", offset=self._start, shape=(len(self), self.d))

    def _foreign(self, got: str) -> AdapterError:
        return AdapterError(
            f"bank: {self.path} must hold one float32 tensor {TENSOR} (slots, d) as AdapterBank wrote it, got {got}. "
            "Bring the whole folder back from a copy."
        )


def _shape(d: int, slots: int) -> bytes:
    """The beginning of the header, of one length for any count of slots."""
    return f'{{"{TENSOR}":{{"dtype":"F32","shape":[{slots:20d},{d}],"data_offsets":[0,{4 * d * slots:20d}]}},'.encode()


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    # not every system can leave out the time of the change
    getattr(os, "fdatasync", os.fsync)(file.fileno())
