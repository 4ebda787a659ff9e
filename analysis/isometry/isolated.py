"""One verdict in a process of its own: a P that takes too long or too much memory costs no other's verdict.

`python -m analysis.isometry.isolated JSON` prints the row as JSON on its last line.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from analysis.isometry.measure import UNDECIDED, verdict
from analysis.spaces import Entry, build, layout
from experiments import models
from experiments.orphans import end_with
from uniproj import plugins

# Seconds of processor time for one projection: two minutes on two cores, however busy the machine is.
LIMIT = 240


def run(
    name: str, variant: Mapping[str, Any], space: str, rank: int, d: int, seed: int, own: Sequence[str]
) -> dict[str, Any]:
    """The row of a verdict with `seconds`, `cpu_seconds` and `peak_bytes`, or with a note why there is none."""
    trusts = models.trusts_remote_code()
    asked = json.dumps([name, dict(variant), space, rank, d, seed, [str(path) for path in own], trusts, os.getpid()])
    refused = Entry(name, variant, None).row() | {"verdict": UNDECIDED}
    done = subprocess.run([sys.executable, "-m", __name__, asked], capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGXCPU:
        return {**refused, "note": f"not done after {LIMIT} s of processor time: a product with this P takes too long"}
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return {**refused, "note": f"failed: {last}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(argv: list[str]) -> None:
    """Measure in this process, on every core."""
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 1))
    # a refused allocation has an error message; where memory runs out, the system may kill other processes too
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    resource.setrlimit(resource.RLIMIT_DATA, (half, half))
    started = time.perf_counter()
    name, variant, space, rank, d, seed, own, trusts, parent = json.loads(argv[0])
    end_with(parent)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    plugins.load(own)
    models.trust_remote_code(trusts)
    measured = verdict(build(name, variant, layout(space, rank), d, seed))
    measured |= {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    # JSON has no NaN
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in measured.items()}
    print(json.dumps(finite))


if __name__ == "__main__":
    main(sys.argv[1:])
