"""Which implementation of the kernels a device gets."""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import cache

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None


def backend(device: torch.device | str = "cpu") -> str:
    """What runs on a device: "triton", "triton-interpreter" (TRITON_INTERPRET=1, for tests) or "torch".

    Without Triton a GPU takes the torch path, after one warning.
    """
    kind = torch.device(device).type
    if os.environ.get("TRITON_INTERPRET") == "1" and HAS_TRITON:
        return "triton-interpreter"
    if kind != "cuda":
        return "torch"
    if HAS_TRITON:
        return "triton"
    _warn_once()
    return "torch"


def uses_triton(device: torch.device) -> bool:
    return backend(device) != "torch"


@cache
def _warn_once() -> None:
    warnings.warn(
        "uniproj: Triton is not installed, so projections on the GPU run in plain PyTorch: slower, and Uni-LoRA "
        "keeps 4 bytes per LoRA parameter there. Install it with `pip install triton`.",
        stacklevel=3,
    )
