"""Pieces of one CPU kernel on several threads: PyTorch's indexing kernels run on one and release the GIL."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import RLock

import torch


def in_parallel(piece: Callable[[slice], None], pieces: Iterable[slice]) -> None:
    """Call `piece` on every slice; pieces write to disjoint places. Without gradients, in the caller's mode."""
    slices, inference = list(pieces), torch.is_inference_mode_enabled()

    def run(which: slice) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            piece(which)

    threads = min(torch.get_num_threads(), len(slices))
    if threads <= 1:
        for which in slices:
            run(which)
        return
    # a pool per call costs 0.1 ms and, unlike a lasting one, survives a fork
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, slices))


def cut(n: int, size: int) -> list[slice]:
    """[0, n) in slices of `size`."""
    return [slice(first, min(first + size, n)) for first in range(0, n, size)]


def forked() -> bool:
    """Whether this process was forked, and so has none of the threads that its parent computed with."""
    return _forked


def _after_fork() -> None:
    global _forked
    _forked = True
    torch.set_num_threads(1)  # PyTorch would wait for ever for those of OpenMP


_forked = False
os.register_at_fork(after_in_child=_after_fork)
# the simplest of Numba's thread pools, which it takes where OpenMP is missing, bears one caller at a time, and a fork
# while another thread imports Numba or compiles leaves locks in the child that nobody releases
ONE_CALLER = RLock()
os.register_at_fork(before=ONE_CALLER.acquire, after_in_parent=ONE_CALLER.release, after_in_child=ONE_CALLER.release)
