"""Memory for large results on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

_LINE = 64  # bytes


def fresh(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor that begins at a cache line.

    NumPy asks the operating system for huge pages (Linux, from 4 MB on), PyTorch does not: 40 MB then cost 20 page
    faults in place of 10,000.
    """
    size = prod(shape) * dtype.itemsize
    memory = np.empty(size + _LINE, dtype=np.uint8)
    start = -memory.ctypes.data % _LINE
    return torch.from_numpy(memory[start : start + size]).view(dtype).view(*shape)
