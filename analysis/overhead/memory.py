"""Bytes: those that live tensors hold, the most that a piece of work took, and those that are still free."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

# The part of the free memory that one measurement may take: the rest is for fragments and for other programs.
_USABLE = 0.8
# of malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def tensor_bytes(device: torch.device) -> int:
    """Bytes of all tensors that are alive on a device: what the allocator says, or each storage counted once."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    storages = {}
    for held in gc.get_objects():
        if _has_memory(held) and held.device.type == "cpu":
            for part in _dense_parts(held):
                storage = part.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _has_memory(held: object) -> bool:
    """Whether it is a tensor with a storage of its own: what a compiler traced with, and left behind, has none."""
    kind = type(held)
    return issubclass(kind, Tensor) and kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def _dense_parts(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.layout is torch.sparse_csr:
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout is torch.strided:
        yield tensor


class Peak:
    """The most memory in use since the last `reset`, in bytes.

    cuda: what the allocator handed out. CPU: the resident set of this process (VmHWM of Linux). Call
    `give_back_at_once` first, or memory that was freed and is kept for later counts too.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def reset(self) -> int:
        """Forget earlier peaks; returns the bytes in use now."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        Path("/proc/self/clear_refs").write_text("5")
        return resident_bytes("VmRSS")

    def read(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resident_bytes("VmHWM")


def give_back_at_once(enabled: bool) -> None:
    """Whether the C library returns freed memory to the system at once, or keeps freed blocks of up to 32 MiB.

    At once, the resident set equals what is in use, and allocations are too slow for timing. Keeping them is what the
    library does by itself after some use.
    """
    C = ctypes.CDLL(None)
    threshold = 2**12 if enabled else 2**25
    C.mallopt(_M_MMAP_THRESHOLD, threshold)
    C.mallopt(_M_TRIM_THRESHOLD, 2 * threshold)
    C.malloc_trim(0)


def resident_bytes(key: str) -> int:
    """Memory of this process by its key in /proc: VmRSS now, VmHWM at its peak, RssAnon without mapped files."""
    return _kilobytes("/proc/self/status", key)


def _kilobytes(file: str, key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path(file).read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"memory: {file} must name {key}, got a file without it. The benchmark needs Linux.")
    return 1024 * int(found[1])


def usable(device: torch.device) -> float:
    """Bytes that a measurement may still take on a device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return _USABLE * torch.cuda.mem_get_info(device)[0]
    return _USABLE * _kilobytes("/proc/meminfo", "MemAvailable")
