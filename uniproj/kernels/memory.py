"""Memory for large results on the CPU."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_LINE = 64  # bytes
# {owner: memory that none of its results uses any more}
_idle: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def fresh(shape: Sequence[int], dtype: torch.dtype, owner: Tensor) -> Tensor:
    """An uninitialised tensor that begins at a cache line.

    Its memory goes back to `owner` (any tensor that lives as long as it is called for) when the last view of it is
    gone, for the next call of the same size: the operating system hands out fresh memory page by page, which takes
    longer than filling it. NumPy asks for huge pages (Linux, from 4 MB on), PyTorch does not.
    """
    size = prod(shape) * dtype.itemsize
    if size < 2**20:
        return torch.empty(*shape, dtype=dtype)
    memory = _idle.pop(owner, None)
    if memory is None or len(memory) != size + _LINE:
        memory = np.empty(size + _LINE, dtype=np.uint8)
    start = -memory.ctypes.data % _LINE
    lent = memory[start : start + size]
    weakref.finalize(lent, _take_back, weakref.ref(owner), memory).atexit = False
    return torch.from_numpy(lent).view(dtype).view(*shape)


def _take_back(owner: weakref.ref[Tensor], memory: np.ndarray) -> None:
    if (alive := owner()) is not None:
        _idle[alive] = memory
