"""theta_d of many adapters in one file: a safetensors tensor that grows in place."""

from __future__ import annotations

import json
import os
import re
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from weakref import finalize

import numpy as np

from uniproj import limits
from uniproj.bank.folder import RESTORE, identity, refusal, replaced
from uniproj.errors import AdapterError
from uniproj.format.tensors import LENGTH, framed, header_length

_PAGE = 4096
TENSOR, _METADATA = "theta_d", "__metadata__"
# a file grows by at least this fraction of its size, so that it grows rarely
_GROWTH = 32
# the last line of the metadata, and the end of the header after it
_LINE, _DIGITS, _END = "uniproj.bank.written", 20, b"}}"
_WRITTEN = re.compile(rb'"%s":"([ 0-9]{%d})"}} *\Z' % (re.escape(_LINE).encode(), _DIGITS))


class Slots:
    """`theta_d` (slots, d) float32 in a safetensors file of one tensor; its header keeps its length as it grows.

    Readers copy single slots by reading the open file, not through a memory map, so a file that is cut off meanwhile is
    an error and not a crash. One writer at a time (the caller ensures it) fills slots that nobody reads. The number of
    slots follows from the size of the file. The header repeats it for other programs, and the next writer corrects it
    if a crash came between the two updates.

    Raises AdapterError for a file that is no such tensor, and if the file is replaced while it is open.
    """

    def __init__(self, path: Path):
        self.path = path
        # opening a pipe would wait for its writer
        self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        finalize(self, os.close, self._file)
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode):
            raise self._foreign("a folder, pipe or device")
        self._identity = status.st_dev, status.st_ino
        self._start = LENGTH + self._header_length()
        self._written_at: int | None = None
        try:
            header = json.loads(self._header())
            (_, self.d), dtype = header[TENSOR]["shape"], header[TENSOR]["dtype"]
            self.metadata: dict[str, str] = {k: text for k, text in header[_METADATA].items() if k != _LINE}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise self._foreign(f"{type(error).__name__}: {error!s:.80}") from None
        if (
            set(header) != {TENSOR, _METADATA}
            or dtype != "F32"
            or type(self.d) is not int
            or self.d < 1
            or not all(type(text) is str for text in self.metadata.values())
            or self._start % _PAGE
        ):
            raise self._foreign(f"tensors {sorted(header)!s:.80}, {dtype!r:.20}")
        if len(self) < 1:
            raise self._foreign("a file without a whole slot")

    @classmethod
    def create(cls, path: Path, d: int, metadata: Mapping[str, str]) -> Slots:
        """A new file with one empty slot."""
        rest = f'"{_METADATA}":{json.dumps(dict(metadata))}}}'.encode().removesuffix(_END) + _written_line(0)
        pad = -(LENGTH + len(_shape(d, 1)) + len(rest)) % _PAGE
        header = _shape(d, 1) + rest + b" " * pad
        with path.open("xb") as file:
            file.write(framed(header))
            file.truncate(LENGTH + len(header) + 4 * d)
            _to_disk(file)
        return cls(path)

    def __len__(self) -> int:
        """Slots in the file now."""
        return max(0, os.fstat(self._file).st_size - self._start) // (4 * self.d)

    def check(self) -> None:
        """Raises AdapterError if another file lies at the path by now, or none."""
        if identity(self.path) != self._identity:
            raise replaced(self.path)

    def read(self, slot: int) -> np.ndarray:
        """A copy of one slot, (d,) float32; of the file that was opened, see `check`."""
        row = np.empty(self.d, "<f4")
        to, at, count = row.view(np.uint8).data, self._place(slot), 0
        try:
            while count < len(to) and (more := os.preadv(self._file, [to[count:]], at + count)):
                count += more
        except OSError as error:
            raise refusal(self.path.parent, error) from error
        if count < len(to):
            raise self._without(slot)
        return row

    def write(self, rows: Iterable[tuple[int, np.ndarray]]) -> None:
        """Fill slots and wait until the disk has them."""
        with self._writable() as file:
            for slot, row in rows:
                file.seek(self._place(slot))
                file.write(np.ascontiguousarray(row, dtype="<f4").data)
            _to_disk(file)

    def reserve(self, slots: int) -> int:
        """Make room for this many slots, or for 1/32 more than there are, and say how many there are then.

        New slots take no space yet, so a full disk is an error only when they are written.
        """
        before = len(self)
        after = before if slots <= before else max(slots, before + before // _GROWTH)
        shape = _shape(self.d, after)
        with self._writable() as file:
            file.seek(LENGTH)
            if after == before and file.read(len(shape)) == shape:
                return after
            # also removes the part of a slot that a crash left
            os.ftruncate(file.fileno(), self._end(after))
            # of fixed length and within the first page, so that no crash leaves half of it
            file.seek(LENGTH)
            file.write(shape)
            _to_disk(file)
        return after

    def written(self) -> int:
        """The last change of the index that was committed with this file; 0 where none is noted."""
        at = self._line()
        # a number with blanks inside was half written, or is not ours
        text = b"" if at is None else self._steady(_DIGITS, at).strip()
        return int(text) if text.isdigit() else 0

    def note(self, change: int) -> None:
        """Note that the index has committed this change, so that an older copy of the index is recognised.

        After a crash, or if two writers finish in reverse order, the number is too small, which does no harm. A file of
        an earlier version gets the line if there is room for it on the page where the header's text ends.
        """
        if (at := self._line()) is not None:
            text = f"{change:{_DIGITS}d}".encode()
        else:
            header = self._header()
            at, text = LENGTH + len(header.rstrip()) - len(_END), _written_line(change)
            if at // _PAGE != (at + len(text) - 1) // _PAGE or at + len(text) > self._start:
                return
        if change > self.written():
            with self._writable() as file:
                file.seek(at)
                file.write(text)

    def _line(self) -> int | None:
        """The position in the file of the number of the last change, if there is one."""
        if self._written_at is None and (found := _WRITTEN.search(self._header())):
            self._written_at = LENGTH + found.start(1)
        return self._written_at

    def _header_length(self) -> int:
        begin = os.pread(self._file, LENGTH, 0)
        length = header_length(begin) if len(begin) == LENGTH else 0
        if length > min(limits.header_bytes, os.fstat(self._file).st_size):
            raise self._foreign(f"a header of {length:,} bytes")
        return length

    def _header(self) -> bytes:
        return self._steady(self._start - LENGTH, LENGTH)

    def _steady(self, size: int, at: int) -> bytes:
        """Bytes of the file, read until two readings agree, as a writer may be changing them."""
        while (text := os.pread(self._file, size, at)) != os.pread(self._file, size, at):
            pass
        return text

    @contextmanager
    def _writable(self) -> Iterator[BinaryIO]:
        # a link may lead to the vectors of another bank
        descriptor = os.open(self.path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "r+b") as file:
            status = os.fstat(descriptor)
            if (status.st_dev, status.st_ino) != self._identity:
                raise replaced(self.path)
            yield file

    def _place(self, slot: int) -> int:
        if not 0 <= slot < len(self):
            raise self._without(slot)
        return self._end(slot)

    def _end(self, slots: int) -> int:
        return self._start + 4 * self.d * slots

    def altered(self, name: str) -> AdapterError:
        """The error for numbers that are not those that were written."""
        return AdapterError(
            f"bank: the numbers of {name!r:.80} must be those that were written, got others (CRC-32 differs): "
            f"{self.path} was altered. Replace or delete that adapter. {RESTORE}"
        )

    def _without(self, slot: int) -> AdapterError:
        return AdapterError(
            f"bank: {self.path} must have slot {slot}, got {len(self)} slots: it is cut off, or another bank's. "
            f"{RESTORE}"
        )

    def _foreign(self, got: str) -> AdapterError:
        return AdapterError(
            f"bank: {self.path} must hold one float32 tensor {TENSOR} (slots, d) as AdapterBank wrote it, got {got}. "
            f"{RESTORE}"
        )


def _shape(d: int, slots: int) -> bytes:
    """The beginning of the header, equally long for any number of slots."""
    return f'{{"{TENSOR}":{{"dtype":"F32","shape":[{slots:20d},{d}],"data_offsets":[0,{4 * d * slots:20d}]}},'.encode()


def _written_line(change: int) -> bytes:
    """The end of the header, equally long for any change."""
    return f',"{_LINE}":"{change:{_DIGITS}d}"'.encode() + _END


def crc(row: np.ndarray) -> int:
    """The CRC-32 of a vector (d,) float32."""
    return zlib.crc32(row.data)


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    # not every system has fdatasync
    getattr(os, "fdatasync", os.fsync)(file.fileno())
