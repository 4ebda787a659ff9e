"""What an action costs, in a fork of this process and under a limit of its memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.forked import found_in_child


class Cost(NamedTuple):
    """What was said (or the error's name and sentence), MB by which the process grew, seconds of the CPU."""

    said: str
    megabytes: float
    seconds: float


def cost(action: Callable[..., object], *args: object, most: int = 512) -> Cost:
    """Of `action(*args)`, which may take at most `most` MB more than this process has."""
    return found_in_child(lambda: _measured(action, args, most))


def _measured(action: Callable[..., object], args: tuple[object, ...], most: int) -> Cost:
    def high() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + most * 2**20,) * 2)
    before, start = high(), time.process_time()
    try:
        said = str(action(*args))
    except BaseException as error:  # told apart by its name
        said = f"{type(error).__name__}: {error}"
    return Cost(said, (high() - before) / 1024, time.process_time() - start)
