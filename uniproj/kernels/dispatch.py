"""Which implementation of the kernels a device gets."""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import cache

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_NUMBA = importlib.util.find_spec("numba") is not None

_MISSING = {
    "triton": "uniproj: Triton is not installed, so projections on the GPU run in plain PyTorch: slower, and Uni-LoRA "
    "keeps 4 bytes per LoRA parameter there. Install it with `pip install triton`.",
    "numba": "uniproj: Numba is not installed, so projections on the CPU run in plain PyTorch: Uni-LoRA, VeRA and "
    "Tied-LoRA take two to three times as long. Install it with `pip install numba`.",
}


def backend(device: torch.device | str = "cpu") -> str:
    """What runs on a device: "triton" on a GPU, "numba" on the CPU, "triton-interpreter" (TRITON_INTERPRET=1), "torch".

    Without Triton a GPU, without Numba the CPU takes the torch path, after one warning. Numba compiles the loops of
    Uni-LoRA's partition and of the shared factors; the other kernels of the CPU are PyTorch's.
    """
    kind = torch.device(device).type
    if _interpreted():
        return "triton-interpreter"
    wanted, found = ("triton", HAS_TRITON) if kind == "cuda" else ("numba", HAS_NUMBA and kind == "cpu")
    if found:
        return wanted
    if kind in ("cuda", "cpu"):
        _warn_once(wanted)
    return "torch"


def uses_triton(device: torch.device) -> bool:
    """Whether the kernels of a device are Triton's."""
    return _interpreted() or (device.type == "cuda" and backend(device) == "triton")


def uses_numba(device: torch.device) -> bool:
    """Whether the kernels of a device are Numba's."""
    return device.type == "cpu" and backend(device) == "numba"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" and HAS_TRITON


@cache
def _warn_once(missing: str) -> None:
    warnings.warn(_MISSING[missing], stacklevel=3)
