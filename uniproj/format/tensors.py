"""The tensors of an adapter: their bytes, their digest, and what must hold for each of them."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from uniproj import limits
from uniproj.errors import AdapterError
from uniproj.format.disk import opened
from uniproj.format.keys import IDENTITY, OF_P, OWN, THETA_D
from uniproj.format.schema import unique_keys
from uniproj.projection import Projection
from uniproj.registry import get

DIGEST = "uniproj.sha256"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# bytes in the length field with which a safetensors file begins
LENGTH = 8
_MOST_AXES = 64  # of a tensor of PyTorch
_OF_NAME = {name: dtype for dtype, name in _DTYPES.items()}
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file, with the digest of all its content in its metadata; equal content gives equal bytes."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    whole = {"format": "pt", **metadata}
    data = safetensors.torch.save(plain, {**whole, DIGEST: digest(plain, whole)})
    # the library writes the metadata in random order
    start = LENGTH + header_length(data[:LENGTH])
    header = json.dumps(json.loads(data[LENGTH:start]), sort_keys=True, separators=(",", ":"))
    return framed(header.encode()) + data[start:]


def streamed(
    index: Mapping[str, tuple[torch.dtype, Sequence[int]]], tensors: Iterable[Tensor]
) -> Iterator[bytes | memoryview]:
    """The pieces of a safetensors file, whose tensors come one at a time, in the order of `index` (dtype and shape by
    name). Raises AdapterError for numbers that are not finite."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in index.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    yield framed(json.dumps(header, separators=(",", ":")).encode())
    for tensor, (name, (dtype, shape)) in zip(tensors, index.items(), strict=True):
        assert tensor.dtype == dtype and tuple(tensor.shape) == tuple(shape)
        check_finite(tensor, f"{name}, as it would be saved")
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def framed(header: bytes) -> bytes:
    """The beginning of a safetensors file: the length of the JSON header, the header, and blanks, as tensors begin at a
    multiple of 8 bytes."""
    header += b" " * (-len(header) % LENGTH)
    return len(header).to_bytes(LENGTH, "little") + header


def header_length(begin: bytes) -> int:
    """What the first `LENGTH` bytes of a safetensors file say. Raises ValueError for fewer bytes."""
    if len(begin) < LENGTH:
        raise ValueError(f"a file of {len(begin)} bytes")
    return int.from_bytes(begin, "little")


class _WeightsFile:
    """A safetensors file of which only the header was read, so that it can be checked before any number is.

    metadata: its lines of text; index: every tensor on the meta device, which has a dtype and a shape and no numbers.
    """

    def __init__(self, file: io.BufferedIOBase, where: str):
        self._file, self._where = file, where
        self._size = file.seek(0, os.SEEK_END)
        file.seek(0)
        limits.check("file_bytes", self._size, "its bytes", where)
        try:
            length = header_length(file.read(LENGTH))
            if length > self._size - LENGTH:
                raise ValueError(f"a header of {length} bytes")
            limits.check("header_bytes", length, "the bytes of its header", where)
            entries = json.loads(file.read(length).decode(), object_pairs_hook=unique_keys)
            self.metadata: dict[str, str] = entries.pop("__metadata__", None) or {}
            if not all(isinstance(line, str) for line in self.metadata.values()):
                raise ValueError("metadata that is no text")
            self._ranges = {name: _range(entry) for name, entry in entries.items()}
            end = 0
            for first, last, _, _ in sorted(self._ranges.values(), key=lambda found: found[:2]):
                if first != end:
                    raise ValueError("tensors that do not follow one another")
                end = last
            if LENGTH + length + end != self._size:
                raise ValueError(f"{end} bytes of tensors behind a header of {length}")
            self.index = {
                name: torch.empty(shape, dtype=dtype, device="meta")
                for name, (_, _, dtype, shape) in self._ranges.items()
            }
        except AdapterError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise self._not_whole(error) from error
        self._start = LENGTH + length

    def read(self) -> dict[str, Tensor]:
        """The tensors with their numbers, each in memory of its own. Raises AdapterError for a file that was cut off
        meanwhile."""
        tensors = {}
        for name, (first, last, dtype, shape) in self._ranges.items():
            numbers = bytearray(last - first)
            self._file.seek(self._start + first)
            if self._file.readinto(numbers) != len(numbers):
                raise self._not_whole(f"{name} ends early")
            flat = torch.frombuffer(numbers, dtype=dtype) if numbers else torch.empty(0, dtype=dtype)
            tensors[name] = flat.view(shape)
        return tensors

    def _not_whole(self, error: object) -> AdapterError:
        return AdapterError(
            f"{self._where}: must be a whole safetensors file, got {self._size} bytes that are not ({error}). It is "
            "truncated or altered: copy or download it again."
        )


@contextmanager
def open_weights(path: Path) -> Iterator[_WeightsFile]:
    """The file of this path, whose numbers may be read within the block.

    Raises AdapterError for what is no whole safetensors file, and beyond `limits`.
    """
    with opened(path) as file:
        yield _WeightsFile(file, str(path))


def _range(entry: Mapping[str, Any]) -> tuple[int, int, torch.dtype, list[int]]:
    """(first byte, end, dtype, shape) of a tensor. Raises ValueError, KeyError or TypeError for what is none."""
    dtype, shape, (first, last) = _OF_NAME[entry["dtype"]], entry["shape"], entry["data_offsets"]
    known = isinstance(shape, list) and len(shape) <= _MOST_AXES
    if not known or any(type(number) is not int or not 0 <= number < 2**63 for number in (*shape, first, last)):
        raise ValueError(f"shape {shape} at {[first, last]}")
    if last - first != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{last - first} bytes for {entry['dtype']} {shape}")
    return first, last, dtype, shape


def check_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> None:
    """Raises AdapterError unless tensors and metadata are those that were written."""
    saved = metadata.get(DIGEST)
    found = digest(tensors, {key: value for key, value in metadata.items() if key != DIGEST})
    if saved != found:
        raise AdapterError(
            f"{where}: its content must have the SHA-256 {str(saved)[:12]}.. noted in it, got {found[:12]}... Some "
            "bytes were altered: copy or download it again."
        )


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of the metadata and of names, dtypes, shapes and bytes of the tensors, in the order of the names."""
    names = sorted(tensors)
    index = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    found = hashlib.sha256(json.dumps([metadata, index], sort_keys=True).encode())
    for name in names:
        found.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def shapes_of(projection: Projection) -> dict[str, torch.Size]:
    """The tensors that an adapter of this projection holds, by their names in the file."""
    own = {f"{OF_P}{name}": p.shape for name, p in projection.named_parameters()}
    return {THETA_D: torch.Size([projection.d]), **own}


def shapes_without_P(tensors: Mapping[str, Tensor], projection: str, d: int) -> dict[str, torch.Size]:
    """As `shapes_of`, before P is made: its own numbers, which a learned one alone has, are taken as they are."""
    of_P = {n: t.shape for n, t in tensors.items() if n.startswith(OF_P)} if get(projection).learned else {}
    return {THETA_D: torch.Size([d]), **of_P}


def check_shapes(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], projection: str) -> None:
    """Raises AdapterError for a trained tensor that is missing, has another shape or no floating dtype, or is none.

    shapes: those of theta_d and of P's own numbers, all that may bear such names.
    """
    if odd := sorted(name for name in tensors if name.startswith(OWN) and name not in {*shapes, IDENTITY}):
        raise AdapterError(
            f"{odd[0]}: the file must hold numbers of {', '.join(shapes)} alone, got these too, which projection "
            f"{projection!r} does not have. Take the adapter from where it was trained."
        )
    for name, shape in shapes.items():
        found = tensors.get(name)
        if found is None or found.shape != shape:
            got = "none" if found is None else str(tuple(found.shape))
            raise AdapterError(
                f"{name}: the file must hold a tensor of shape {tuple(shape)}, got {got}. "
                f"It is not an adapter of projection {projection!r} with this d, or it is truncated."
            )
        if found.dtype not in FLOATS:
            raise AdapterError(
                f"{name}: must be of dtype float32 (or float64, bfloat16, float16), got {found.dtype}. "
                "Use another checkpoint."
            )


def check_numbers(tensors: Mapping[str, Tensor], projection: str, has_offset: bool | None = None) -> None:
    """Raises AdapterError for a number that is not finite, and for theta_d = 0 where c = 0.

    has_offset: whether P has a c, where that is known; else what its class says.
    """
    for name, tensor in tensors.items():
        check_finite(tensor, name)
    may_be_zero = "linear" not in get(projection).claims if has_offset is None else has_offset
    if not may_be_zero and not tensors[THETA_D].any():
        raise AdapterError(
            f"{THETA_D}: theta_d = 0 is a saddle (A = B = 0, gradient 0) that training never leaves. "
            "Use an adapter that was trained, or a new one."
        )


def check_finite(tensor: Tensor, where: str) -> None:
    """Raises AdapterError for a number that is NaN or inf."""
    known = tensor if tensor.dtype in FLOATS else tensor.float()  # 8-bit floats know no isfinite
    if tensor.is_floating_point() and not torch.isfinite(known).all():
        raise AdapterError(f"{where}: all numbers must be finite, got NaN or inf. Use another checkpoint.")
