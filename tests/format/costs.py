"""What a command costs on a file, measured in a fork of a fresh process under a limit of its memory.

`python -m tests.format.costs MB ACTION:FOLDER ..` prints one line of JSON for each: what was said (or the sentence of
the error), MB by which the process grew, seconds of the CPU.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Cost(NamedTuple):
    said: str
    megabytes: float
    seconds: float


def costs(*asked: tuple[str, Path], most: int = 1024, **environment: str) -> list[Cost]:
    """Of each (action, folder), with at most `most` MB more than after the imports."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.format.costs", str(most), *(f"{action}:{folder}" for action, folder in asked)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    return [Cost(*json.loads(line)) for line in found.stdout.splitlines()]


def _measured(action: Callable[[str], object], folder: str, most: int) -> Cost:
    def high() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + most * 2**20,) * 2)
    before, start = high(), time.process_time()
    try:
        said = str(action(folder))
    except BaseException as error:  # told apart by its name
        said = f"{type(error).__name__}: {error}"
    return Cost(said, (high() - before) / 1024, time.process_time() - start)


def _main(most: int, asked: list[str]) -> None:
    from uniproj.exchange import export
    from uniproj.exchange.verify import verify
    from uniproj.format import file

    actions: dict[str, Callable[[str], object]] = {
        "read": file.read,
        "verify": verify,
        "export": lambda folder: export(folder, f"{folder}-exported"),
    }
    for action, folder in (one.split(":", 1) for one in asked):
        if not (child := os.fork()):
            print(json.dumps(_measured(actions[action], folder, most)), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
