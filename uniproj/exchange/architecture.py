"""Limits on what a base model's configuration asks to build, checked before and during the building."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from uniproj.errors import AdapterError

# the longest contexts have 10 million tokens
_SIZE = 2**24
# of layers, experts and the like; of labels, of which Transformers keeps a table
_COUNT, _LABELS = 1024, 2**17
# of modules: mixtures with 384 experts in 61 layers have 94,000
MODULES = 2**17
# numbers of a model for each byte of the weights in its folder: those of 2 bits have 4
_NUMBERS = 4
_COUNTS = re.compile(r"(^|_)(layers?|depths?|experts?|blocks|stages)$|^(n|num)_.*(layer|expert|block|stage)")
_NO_SIZES = re.compile("theta|seed|max_length")
_WEIGHTS = (".safetensors", ".bin")


def check_sizes(value: Any, base: str, key: str = "") -> None:
    """Raises AdapterError for a number that no real model has in its configuration. key: that of `value`."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            check_sizes(inner, base, str(name))
    elif isinstance(value, list):
        for inner in value:
            check_sizes(inner, base, key)
    elif isinstance(value, int | float) and not _NO_SIZES.search(key):
        most = _COUNT if _COUNTS.search(key) else _LABELS if "labels" in key else _SIZE
        if value > most and (isinstance(value, int) or most == _COUNT):
            raise AdapterError(
                f"{base}: {key} of the base model's configuration must be at most {most}, got {value:g}. "
                "Take the original."
            )


def check_weights(base: str, model: nn.Module) -> None:
    """Raises AdapterError for a folder whose weights have too few bytes for the model of its configuration."""
    numbers = sum(p.numel() for p in model.parameters())
    files = list(Path(base).iterdir()) if Path(base).is_dir() else []
    held = sum(file.stat().st_size for file in files if file.suffix in _WEIGHTS)
    if files and numbers > _NUMBERS * held:
        raise AdapterError(
            f"{base}: the weights must be those of its configuration, of {numbers:,} numbers, got {held:,} bytes. "
            "Take the original."
        )


@contextmanager
def bounded(base: str) -> Iterator[None]:
    """Raises AdapterError as soon as a model that is built inside has more than MODULES modules."""
    modules = 0

    def count(*_: Any) -> None:
        nonlocal modules
        modules += 1
        if modules > MODULES:
            raise AdapterError(f"{base}: the base model must have at most {MODULES:,} modules, got more. Take another.")

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
