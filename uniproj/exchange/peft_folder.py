"""A folder as PEFT writes it for any of its methods: a configuration and a safetensors file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor

from uniproj.errors import AdapterError
from uniproj.format import schema
from uniproj.format.disk import exists, read_json, replace
from uniproj.format.fields import CommonFields, Configuration
from uniproj.format.file import CONFIG, UNSAFE, WEIGHTS, config_text
from uniproj.format.tensors import check_finite, open_weights, streamed


def read_config(folder: Path, kind: str) -> PeftConfig:
    """The configuration of an adapter of this PEFT type. Raises AdapterError for a missing file and another type."""
    fields = _fields(folder)
    if (found := str(fields.get("peft_type"))) != kind:
        raise AdapterError(f"{folder}: must hold an adapter of PEFT type {kind}, got {found}. Take another.")
    schema.check(Configuration if kind == "LORA" else CommonFields, fields, f"{folder / CONFIG}: ")
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{folder / CONFIG}: must be a configuration of PEFT, got {error}. Restore it.") from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter by PEFT's names, on the CPU.

    Raises AdapterError for a missing file, for adapter_model.bin, which is never opened, for a truncated file, and for
    numbers that are not finite.
    """
    if not (folder / WEIGHTS).is_file():
        got = f"{UNSAFE}, which can run code when it is opened and is not" if (folder / UNSAFE).exists() else "none"
        raise AdapterError(f"{folder}: must hold {WEIGHTS}, got {got}. Save the adapter as safetensors.")
    with open_weights(folder / WEIGHTS) as file:
        tensors = file.read()
    for tensor in tensors.values():
        check_finite(tensor, str(folder))
    return tensors


def peft_type(folder: Path) -> str:
    """The PEFT type that the configuration in a folder names. Raises AdapterError for a folder without one."""
    return str(_fields(folder).get("peft_type"))


def _fields(folder: Path) -> dict[str, Any]:
    if not exists(folder / CONFIG) or not (folder / CONFIG).is_file():
        raise AdapterError(f"{folder}: must be a folder with {CONFIG}, got none. Check the path.")
    fields = read_json(folder / CONFIG)
    return fields if isinstance(fields, dict) else {"peft_type": "none"}


def write(
    folder: Path,
    config: Mapping[str, Any],
    index: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensors: Iterable[Tensor],
) -> None:
    """Write both files, or none; `tensors` come one at a time, in the order of `index` (dtype and shape by name).

    Raises AdapterError for numbers that are not finite, and if the disk refuses; older files then stay as they were.
    """
    replace({folder / WEIGHTS: streamed(index, tensors), folder / CONFIG: config_text(config).encode()})
