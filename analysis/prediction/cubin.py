"""The instructions of Triton kernels, compiled for sm_90 and disassembled: no GPU is needed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from experiments.errors import ExperimentError

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*(\w+)(.*)")
_LABEL = re.compile(r"^\.(L_\w+):")
_TARGET = re.compile(r"\(\.(L_\w+)\)")


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its name, how many programs of how many warps, and what a GPU would be given."""

    kernel: str
    programs: int
    warps: int
    cubin: bytes


class _Hopper:
    """What Triton asks of the driver of an H100 to compile, and not to launch."""

    def get_current_device(self) -> str:
        return "sm_90"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def launches(call: Callable[[], object]) -> list[Launch]:
    """What a function launches, compiled for these arguments as Triton's launcher does; tensors are on "meta"."""
    found, compiled = [], JITFunction.run

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        binary = compiled(kernel, *args, grid=grid, warmup=True, **options)
        found.append(Launch(kernel.__name__, prod(grid), binary.metadata.num_warps, binary.asm["cubin"]))

    with patch.object(triton.runtime.driver, "_active", _Hopper()), patch.object(JITFunction, "run", record):
        call()
    return found


def of_a_warp(launch: Launch, trips: Sequence[float]) -> float:
    """Instructions that one warp issues, where loop k, by its place, is run trips[k] times each time it is reached.

    Both sides of a branch count. Raises ExperimentError unless there are as many loops as trips.
    """
    lines, loops = _disassembled(launch.cubin)
    if len(loops) != len(trips):
        raise ExperimentError(
            f"prediction: kernel {launch.kernel} must have {len(trips)} loops, got {len(loops)} from Triton "
            f"{triton.__version__}. Count their trips again in analysis/prediction/operators.py."
        )
    return sum(prod(trips[k] for k, loop in enumerate(loops) if line in loop) for line in range(lines))


def _disassembled(cubin: bytes) -> tuple[int, list[range]]:
    """How many instructions, and which of them each loop holds, in the order in which they begin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    count, labels, ends = 0, {}, {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = count
        elif found := _INSTRUCTION.match(line):
            target = _TARGET.search(found[2]) if found[1] == "BRA" else None
            first = labels.get(target[1]) if target else None
            if first == count:  # the branch to itself behind the last instruction, and what fills the line of the cache
                break
            if first is not None:
                ends[first] = count
            count += 1
    return count, [range(first, ends[first] + 1) for first in sorted(ends)]
