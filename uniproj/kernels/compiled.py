"""Loops that Numba compiles, and their calls on at most as many threads as PyTorch uses."""

from __future__ import annotations

from functools import cache
from types import FunctionType
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from uniproj.kernels.threads import ONE_CALLER, forked

parallel = numba.njit(parallel=True, cache=True)

_GRAIN = 2**17  # numbers for which one more thread is worth waking


def call(loop: Any, *arguments: Tensor | np.ndarray[Any, Any] | int | None) -> None:
    """Call a compiled loop; tensors go in as the arrays of their memory."""
    arrays = [_array(value) if isinstance(value, Tensor) else value for value in arguments]
    launch(loop, max(value.size for value in arrays if isinstance(value, np.ndarray)), *arrays)


def launch(loop: Any, size: int, *arguments: np.ndarray[Any, Any] | int | None) -> None:
    """Call a compiled loop, `size` the most numbers of an argument, on the threads that these are worth."""
    allowed = torch.get_num_threads()
    threads = min(allowed, numba.config.NUMBA_NUM_THREADS, max(1, size // _GRAIN))
    with ONE_CALLER:
        if threads == 1 or forked():
            _serial(loop)(*arguments)
            return
        numba.set_num_threads(threads)
        loop(*arguments)
    if torch.get_num_threads() != allowed:
        # Numba starts its threads at the first call, and may share OpenMP and its number of threads with PyTorch
        torch.set_num_threads(allowed)


@cache
def _serial(loop: Any) -> Any:
    """The same loop without Numba's threads, which end a forked process that calls one (GNU OpenMP), or hang it."""
    source = loop.py_func
    alone = FunctionType(source.__code__, source.__globals__, source.__name__)
    # Numba keeps what it compiled under this name
    alone.__module__, alone.__qualname__ = source.__module__, f"{source.__qualname__}_serial"
    return numba.jit(**{**loop.targetoptions, "parallel": False, "nogil": True}, cache=True)(alone)


def _array(x: Tensor) -> np.ndarray[Any, Any]:
    """The memory of x; half-precision numbers, of which NumPy knows one kind only, as the integers of their bits."""
    return (x.view(torch.int16) if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()
