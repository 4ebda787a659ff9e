"""Which implementation of an operator a device gets.

The file of an operator computes in plain PyTorch and knows no backend. A backend is files beside it that are named
`<operator>_<backend>.py`; a function there of the same name (but for its leading underscore) and arguments takes the
place of the operator's own where the backend runs. Files are imported at the first call on such a device, as Numba and
Triton take long to import. Numba and Triton run where `backend` says; a file of any other backend says it itself:

    RUNS_ON = ("mps",)  # kinds of device
"""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from uniproj.kernels.threads import ONE_CALLER

_NOTHING = nullcontext()
HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_NUMBA = importlib.util.find_spec("numba") is not None

_MISSING = {
    "triton": "uniproj: Triton is not installed, so projections on the GPU run in plain PyTorch: slower, and Uni-LoRA "
    "keeps 4 bytes per LoRA parameter there. Install it with `pip install triton`.",
    "numba": "uniproj: Numba is not installed, so projections on the CPU run in plain PyTorch: most "
    "take two to four times as long. Install it with `pip install numba`.",
}
_OWN = {"cuda": ["triton"], "cpu": ["numba"]}


def backend(device: torch.device | str = "cpu") -> str:
    """What runs on a device: "triton" on a GPU, "numba" on the CPU, "triton-interpreter" (TRITON_INTERPRET=1), "torch".

    Without Triton a GPU, without Numba the CPU takes the torch path, after one warning. Numba compiles the operators of
    the CPU but those of dense and sparse matrices and of runs of neighbours, which are PyTorch's. A backend that was
    added for this kind of device comes first, with the operators that it has.
    """
    return next((name for name in _preferred(torch.device(device).type) if _installed(name)), "torch")


def run(operator: Callable[..., Any], device: torch.device, *arguments: Any) -> Any:
    """What an operator gives on a device."""
    compute = implementation(operator, device)
    with on(device):
        return compute(*arguments)


def on(device: torch.device) -> AbstractContextManager[None]:
    """A block in which a device is the current one of its kind: Triton launches there."""
    return _NOTHING if device.index is None else torch.accelerator.device_index(device.index)


def implementation(operator: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """What computes an operator on a device: its namesake in the file of a backend that runs there, or else itself."""
    return _implementation(operator, tuple(name for name in _preferred(device.type) if _installed(name)))


@cache
def _implementation(operator: Callable[..., Any], backends: tuple[str, ...]) -> Callable[..., Any]:
    for name in backends:
        file = _file(operator.__module__, name.removesuffix("-interpreter"))
        if file and (found := _namesake(operator, file)):
            return found
    return operator


def _preferred(kind: str) -> list[str]:
    """The backends of a kind of device, installed or not, the first choice first."""
    if os.environ.get("TRITON_INTERPRET") == "1" and HAS_TRITON:
        return [*_added(kind), "triton-interpreter"]
    return [*_added(kind), *_OWN.get(kind, [])]


def _installed(name: str) -> bool:
    """Whether a backend can run here; what cannot is named once."""
    found = {"triton": HAS_TRITON, "numba": HAS_NUMBA}.get(name, True)
    if not found:
        _warn_once(name)
    return found


@cache
def _added(kind: str) -> list[str]:
    """The backends for a kind of device that are neither Triton nor Numba."""
    found = set()
    for file in pkgutil.iter_modules(import_module(__package__).__path__):
        name = file.name.partition("_")[2]
        if name and name not in _MISSING and kind in _load(f"{__package__}.{file.name}").RUNS_ON:
            found.add(name)
    return sorted(found)


@cache
def _file(home: str, name: str) -> str | None:
    file = f"{home}_{name}"
    return file if importlib.util.find_spec(file) else None


@cache
def _namesake(operator: Callable[..., Any], file: str) -> Callable[..., Any] | None:
    return getattr(_load(file), operator.__name__.removeprefix("_"), None)


def _load(file: str) -> ModuleType:
    with ONE_CALLER:
        return import_module(file)


@cache
def _warn_once(missing: str) -> None:
    warnings.warn(_MISSING[missing], stacklevel=4)
