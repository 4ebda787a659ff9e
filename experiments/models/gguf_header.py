"""The header of a GGUF file, judged by the file's own length before a library believes its counts."""

from __future__ import annotations

import mmap
from math import prod
from pathlib import Path

from experiments.errors import ExperimentError

_MAGIC, _VERSIONS, _ALIGNMENT = b"GGUF", (2, 3), 32
# bytes of a value of each type; texts and lists say their own lengths
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _LIST = 8, 9
# bytes of the shortest entry: an empty name, a type and a byte; an empty name, no sizes, a type and an offset
_LEAST_FIELD, _LEAST_TENSOR = 13, 24
_DIMENSIONS = 4
# of the lists in the header, each of which readers keep as an object: the largest vocabularies have 1.3 million
VALUES = 2**22


def check(path: Path) -> None:
    """Raises ExperimentError unless counts, lengths, types and offsets of a GGUF file lie within the file."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise _refusal(path, "an empty one")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Header(path, data).check()


def _refusal(path: Path, got: str) -> ExperimentError:
    return ExperimentError(f"models: {path} must be a whole GGUF file, got {got}. Download it again.")


class _Header:
    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at, self.values = path, data, 0, 0

    def check(self) -> None:
        from gguf import GGML_QUANT_SIZES  # most models are read without

        if self.take(4) != _MAGIC:
            raise _refusal(self.path, "other bytes at its start")
        if (version := self.number(4)) not in _VERSIONS:
            raise _refusal(self.path, f"version {version}, where {_VERSIONS} are known")
        tensors, fields = self.number(8), self.number(8)
        self.check_count(fields, _LEAST_FIELD, "fields")
        self.check_count(tensors, _LEAST_TENSOR, "tensors")
        known = {self.text(): self.value(self.number(4)) for _ in range(fields)}
        for name, value in known.items():
            if name.endswith(b".block_count") and (value is None or value > tensors):
                raise _refusal(self.path, f"{value} blocks of {tensors} tensors")
        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        ends, total = [0], 0
        for _ in range(tensors):
            self.text()
            if (dimensions := self.number(4)) > _DIMENSIONS:
                raise _refusal(self.path, f"a tensor of {dimensions} dimensions")
            numel = prod(self.number(8) for _ in range(dimensions))
            kind, offset = self.number(4), self.number(8)
            if kind not in sizes:
                raise _refusal(self.path, f"a tensor of the unknown type {kind}")
            block, length = sizes[kind]
            ends.append(offset + numel // block * length)
            total += ends[-1] - offset
        alignment = known.get(b"general.alignment") or _ALIGNMENT
        left = len(self.data) - -(-self.at // alignment) * alignment
        if max(*ends, total) > max(left, 0):
            raise _refusal(self.path, f"tensors of {max(*ends, total)} bytes where {left} are left")

    def skip(self, length: int) -> None:
        if length > (left := len(self.data) - self.at):
            raise _refusal(self.path, f"an entry of {length} bytes in its header where {left} are left")
        self.at += length

    def take(self, length: int) -> bytes:
        self.skip(length)
        return self.data[self.at - length : self.at]

    def number(self, length: int) -> int:
        return int.from_bytes(self.take(length), "little")

    def text(self) -> bytes:
        return self.take(self.number(8))

    def check_count(self, count: int, least: int, what: str) -> None:
        if count * least > (left := len(self.data) - self.at):
            raise _refusal(self.path, f"{count} {what} in the {left} bytes that are left")

    def value(self, kind: int) -> int | None:
        """Pass a value; the number itself where it is a whole one."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _TEXT:
            self.text()
            return None
        if kind != _LIST or (kind := self.number(4)) not in (*_SCALARS, _TEXT):
            raise _refusal(self.path, f"a field of the unknown type {kind}")
        count = self.number(8)
        self.check_count(count, _SCALARS.get(kind, 8), "values")
        self.values += count
        if self.values > VALUES:
            raise _refusal(self.path, f"more than {VALUES} values in its header")
        if kind == _TEXT:
            for _ in range(count):
                self.text()
        else:
            self.skip(count * _SCALARS[kind])
        return None
