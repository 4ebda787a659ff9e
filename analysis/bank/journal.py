"""What one process of the soak did, on disk, so that it is known after the process was killed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

_Operation = tuple[str, str, int]
_PAIR = 8
_SCHEDSTAT = Path("/proc/self/schedstat")


@dataclass
class _Past:
    """What a journal says.

    tokens: of every name of the process's own, before the write in which it was killed, if it was: `pending`. shared:
    every token that it meant to write under a shared name. done: finished operations. begun: writes, finished or not.
    interrupted: kills within a write.
    """

    tokens: dict[str, int] = field(default_factory=dict)
    shared: dict[str, set[int]] = field(default_factory=dict)
    pending: _Operation | None = None
    done: int = 0
    begun: int = 0
    interrupted: int = 0


class Journal:
    """Lines of text: `begin KIND NAME TOKEN` before a write, `done` after every operation.

    A process that was killed leaves an open `begin`, which `settle` answers. Beside the lines lie the times of reads,
    pairs of float32: seconds on the clock, and seconds in which the process neither ran nor waited for a processor.
    """

    def __init__(self, path: Path):
        self._lines, self._times = path.with_suffix(".journal"), path.with_suffix(".reads")

    def begin(self, kind: str, name: str, token: int) -> None:
        """Note what is about to be written."""
        _append(self._lines, f"begin {kind} {name} {token}\n".encode())

    def finish(self) -> None:
        """Note that the operation is done."""
        _append(self._lines, b"done\n")

    def settle(self, happened: bool) -> None:
        """Note of the write in which the process was killed whether it happened."""
        _append(self._lines, b"happened\n" if happened else b"undone\n")

    def mend(self) -> None:
        """Cut off what a kill left half written."""
        for path, whole in ((self._lines, _last_line), (self._times, lambda content: len(content) // _PAIR * _PAIR)):
            if path.exists():
                os.truncate(path, whole(path.read_bytes()))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Time a read."""
        scheduled, clock = _scheduled(), time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - clock
            blocked = max(0.0, seconds - (_scheduled() - scheduled))
            _append(self._times, np.array([seconds, blocked], dtype="<f4").tobytes())

    def reads(self) -> np.ndarray:
        """(n, 2) seconds: on the clock, and blocked."""
        return np.frombuffer(self._times.read_bytes(), dtype="<f4").reshape(-1, 2)

    def finished(self) -> int:
        """Operations that no kill interrupted."""
        return self._lines.read_bytes().count(b"done\n") if self._lines.exists() else 0

    def past(self) -> _Past:
        """All of it, read through."""
        past = _Past()
        for line in self._lines.read_text().splitlines() if self._lines.exists() else []:
            word, *rest = line.split(" ")
            if word == "begin":
                kind, name, token = rest
                past.pending = (kind, name, int(token))
                past.begun += 1
                if name.startswith("shared"):
                    past.shared.setdefault(name, set()).add(int(token))
                continue
            if word != "undone":
                past.done += 1
                _apply(past)
            past.interrupted += word != "done"
            past.pending = None
        return past


def _apply(past: _Past) -> None:
    if past.pending is not None and not past.pending[1].startswith("shared"):
        kind, name, token = past.pending
        past.tokens.pop(name, None)
        if kind != "delete":
            past.tokens[name] = token


def _last_line(content: bytes) -> int:
    return content.rfind(b"\n") + 1


def _append(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, content)
    os.close(descriptor)


def _scheduled() -> float:
    """Seconds that this process ran or waited for a processor; 0 where Linux does not count them."""
    try:
        ran, waited, _ = _SCHEDSTAT.read_text().split()
    except OSError:
        return 0.0
    return (int(ran) + int(waited)) * 1e-9
