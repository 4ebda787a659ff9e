"""Calls of the loops that Numba compiles (`kernels/numba/`), on at most as many threads as PyTorch uses."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from threading import RLock
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uniproj.kernels.threads import forked

# the simplest of Numba's thread pools, which it takes where OpenMP is missing, bears one caller at a time, and a fork
# while another thread imports Numba or compiles leaves locks in the child that nobody releases
_ONE_CALLER = RLock()
os.register_at_fork(before=_ONE_CALLER.acquire, after_in_parent=_ONE_CALLER.release, after_in_child=_ONE_CALLER.release)
_GRAIN = 2**17  # numbers for which one more thread is worth waking


def call(file: str, loop: str, *arguments: Tensor | int) -> None:
    """Call a loop of `kernels/numba/<file>.py`; tensors go in as the arrays of their memory."""
    largest = max(value.numel() for value in arguments if isinstance(value, Tensor))
    allowed = torch.get_num_threads()
    with _ONE_CALLER:
        import numba

        function = getattr(import_module(f"uniproj.kernels.numba.{file}"), loop)
        if forked():
            function = _serial(function)
        else:
            numba.set_num_threads(min(allowed, numba.config.NUMBA_NUM_THREADS, max(1, largest // _GRAIN)))
        function(*(_array(value) if isinstance(value, Tensor) else value for value in arguments))
    if torch.get_num_threads() != allowed:
        # Numba starts its threads at the first call, and may share OpenMP and its number of threads with PyTorch
        torch.set_num_threads(allowed)


@cache
def _serial(loop: Any) -> Any:
    """The same loop without Numba's threads, which end a forked process that calls one (GNU OpenMP), or hang it."""
    import numba

    source = loop.py_func
    alone = FunctionType(source.__code__, source.__globals__, source.__name__)
    # Numba keeps what it compiled under this name
    alone.__module__, alone.__qualname__ = source.__module__, f"{source.__qualname__}_serial"
    return numba.jit(**{**loop.targetoptions, "parallel": False, "nogil": True}, cache=True)(alone)


def _array(x: Tensor) -> np.ndarray[Any, Any]:
    """The memory of x; half-precision numbers, of which NumPy knows one kind only, as the integers of their bits."""
    return (x.view(torch.int16) if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()
