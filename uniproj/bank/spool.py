"""Vectors that are collected before the one transaction that adds them all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np

from uniproj.bank.folder import disk
from uniproj.errors import AdapterError

# vectors held in memory, and written at a time
_CHUNK = 256

_Chunk = list[tuple[str, np.ndarray]]


class Spool:
    """Names and vectors in their order: 256 in memory, those before them in a file.

    The file has no name, lies in the bank's folder, and is gone with the process. Raises AdapterError if the disk is
    full, and in a forked child, which would share the file.
    """

    def __init__(self, folder: Path):
        self._folder, self._process = folder, os.getpid()
        self._file: IO[bytes] | None = None
        self._names: list[str] = []
        self._chunk: _Chunk = []

    def append(self, name: str, row: np.ndarray) -> None:
        """Add one more vector (d,) float32."""
        if len(self._chunk) == _CHUNK:
            with disk(self._folder):
                self._write()
        self._chunk.append((name, row))

    def chunks(self) -> Iterator[_Chunk]:
        """All vectors, in chunks."""
        self._check_process()
        if self._file is not None:
            self._file.seek(0)
            d = len(self._chunk[0][1])
            for first in range(0, len(self._names), _CHUNK):
                names = self._names[first : first + _CHUNK]
                yield [(name, np.frombuffer(self._file.read(4 * d), "<f4")) for name in names]
        yield self._chunk

    def close(self) -> None:
        """Delete the file."""
        if self._file is not None:
            # closing flushes, which fails again on a full disk
            with suppress(OSError):
                self._file.close()

    def _write(self) -> None:
        self._check_process()
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        for name, row in self._chunk:
            self._file.write(row.data)
            self._names.append(name)
        # so that a forked child has nothing buffered that it would write again
        self._file.flush()
        self._chunk = []

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise AdapterError(
                f"bank: add_many must end in the process {self._process} that began it, got its child {os.getpid()}. "
                "End the child, or call add_many in it anew."
            )
