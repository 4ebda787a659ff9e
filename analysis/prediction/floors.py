"""The least time of an operator on a GPU, by each thing that its kernels use up.

Two floors follow from published figures: bytes over the bandwidth of the memory, and instructions over those that are
issued. Two more are for the caches, whose figures are measured by others or guessed. The prediction is the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from analysis.prediction.cubin import launches, of_a_warp
from analysis.prediction.operators import Operator, Read

_SECTOR = 32  # bytes that a random read moves
_WARP = 32
_LINES = 4  # lines that the first-level cache of a multiprocessor looks up in a clock: not published, a guess
_ISSUED = 4  # warp instructions of a multiprocessor in a clock


@dataclass(frozen=True)
class Gpu:
    """Bytes a second of the memory, multiprocessors and their clock, between that of the base and the highest.

    first_level: bytes of the first-level cache beside the shared memory that every program takes. cache_bandwidth:
    bytes a second of the second-level cache, about what microbenchmarks of an H100 find.
    """

    name: str
    bandwidth: float
    multiprocessors: int = 132
    clock: float = 1.755e9
    first_level: float = 192e3
    cache_bandwidth: float = 5.5e12


GPUS = (Gpu("H100 SXM", 3.35e12), Gpu("H200", 4.8e12))


def _counted(operator: Operator) -> tuple[str, float]:
    """The kernels of an operator, and the warp instructions that they issue in all."""
    found = launches(operator.call)
    issued = sum(of_a_warp(one, operator.trips[one.kernel]) * one.warps * one.programs for one in found)
    return ", ".join(one.kernel for one in found), issued


def floors(operator: Operator, issued: float, gpu: Gpu) -> dict[str, Any]:
    """Seconds by each floor, the largest, and copies of D floats (8 D bytes) by two floors and by all.

    memory: bytes from and to memory over its bandwidth; a random read moves a sector of 32. issue: instructions over
    those issued in a clock. cache: what comes from memory, what is read again, and a sector for each random read that
    the first-level cache does not hold, over the bandwidth of the second-level cache. lines: random reads, a line
    each, over the lines that are looked up in a clock.
    """
    memory = operator.streamed + _SECTOR * sum(read.count for read in operator.reads if read.cold)
    through = memory + operator.cached + _SECTOR * _missed(operator.reads, gpu.first_level)
    clocks = gpu.multiprocessors * gpu.clock
    times = {
        "memory": memory / gpu.bandwidth,
        "issue": issued / _ISSUED / clocks,
        "cache": through / gpu.cache_bandwidth,
        "lines": sum(read.count for read in operator.reads) / _LINES / clocks,
    }
    bound = max(times, key=lambda name: times[name])
    copy = 8 * operator.D / gpu.bandwidth
    copies = {"copies_of_two": max(times["memory"], times["issue"]) / copy, "copies": times[bound] / copy}
    return {"gpu": gpu.name, **times, "predicted": times[bound], "bound": bound, **copies}


def _missed(reads: Sequence[Read], room: float) -> float:
    """The reads of warm arrays that the first-level cache does not hold, where what is read most often stays in it."""
    missed = 0.0
    for read in sorted((read for read in reads if not read.cold), key=lambda read: read.size / read.count):
        held = min(read.size, room)
        missed += read.count * (1 - held / read.size)
        room -= held
    return missed


def predicted(operator: Operator) -> list[dict[str, Any]]:
    """A row for each GPU: the operator, its counts for each coordinate, its floors, and the goal."""
    kernels, issued = _counted(operator)
    counts = {
        "operator": operator.name,
        "D": operator.D,
        "d": operator.d,
        "kernels": kernels,
        "instructions": issued * _WARP / operator.D,
        "streamed_bytes": operator.streamed / operator.D,
        "random_reads": sum(read.count for read in operator.reads) / operator.D,
    }
    return [{**counts, **floors(operator, issued, gpu), "goal": operator.goal} for gpu in GPUS]
