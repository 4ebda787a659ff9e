"""What a bank must know of an adapter: its tuner, its header, its vector, and that it has no other numbers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from uniproj.errors import AdapterError
from uniproj.format.compatibility import first_difference
from uniproj.format.fields import Role, used
from uniproj.format.file import read
from uniproj.format.header import Header
from uniproj.format.keys import THETA_D
from uniproj.tuner import UniProjModel, adapter_of
from uniproj.tuner.attached import tuner_of


def active_adapter(tuner: UniProjModel, where: str) -> str:
    """The name of the one active adapter. Raises AdapterError if there are several, or none."""
    active = list(tuner.active_adapters)
    if len(active) != 1:
        raise AdapterError(f"{where}: one adapter must be active, got {active}. Call set_adapter with one name first.")
    return str(active[0])


def layers_of(tuner: UniProjModel, adapter_name: str) -> list[LoraLayer]:
    """The layers that hold an adapter."""
    return [m for m in tuner.modules() if isinstance(m, LoraLayer) and adapter_name in m.r]


def header_of(tuner: UniProjModel, adapter_name: str) -> Header:
    """The header of an attached adapter. Raises AdapterError if it trains numbers beside theta_d."""
    projection = adapter_of(tuner, adapter_name).P
    header = Header.of(tuner.peft_config[adapter_name].to_dict(), projection, tuner.model)
    _check_alone(header, [name for name, _ in projection.named_parameters()])
    return header


def read_adapter(source: Any, what: str, kinds: str) -> tuple[Header, Tensor]:
    """Header and theta_d of a model's active adapter, or of a folder. what, kinds: for the error about other types."""
    if isinstance(source, nn.Module):
        tuner = tuner_of(source, "bank")
        adapter_name = active_adapter(tuner, "bank")
        return header_of(tuner, adapter_name), adapter_of(tuner, adapter_name).theta_d
    if not isinstance(source, str | Path):
        raise AdapterError(
            f"bank: {what} must be {kinds} or the folder of a saved adapter, got a {type(source).__name__}. "
            "Numbers go into bank.add by torch.as_tensor(numbers)."
        )
    saved = read(source)
    if saved.header is None:
        raise AdapterError(
            f"bank: {source} must hold a header of its P, got a file of an earlier format. "
            "Load it with PeftModel.from_pretrained and pass the model."
        )
    _check_alone(saved.header, sorted(set(saved.tensors) - {THETA_D}))
    return saved.header, saved.theta_d


def _check_alone(header: Header, other: Iterable[str]) -> None:
    """Refuse an adapter with trained numbers beside theta_d: Parameters of P, or copies of modules of the base."""
    if learned := sorted(other):
        raise AdapterError(
            f"bank: {header.projection} must have no numbers of its own, got the learned {', '.join(learned)[:80]}: a "
            "bank holds the theta_d of one fixed P. Save such adapters one by one, with save_pretrained."
        )
    if more := used(header.settings, Role.BESIDE):
        raise AdapterError(
            f"bank: an adapter must train theta_d alone, got {more[0]} = {header.settings[more[0]]!r}. "
            "Save adapters with a head of their own one by one, with save_pretrained."
        )


def check_same(mine: Header, other: Header, what: str) -> None:
    """Refuse an adapter of another P, scale or layout, and name the first difference."""
    difference = mine.difference(other)
    if difference is None:
        return
    if difference.startswith("layout_fingerprint"):
        difference = str(first_difference(mine.layout, other.layout) or difference)
    raise AdapterError(f"bank: {what} must have the bank's P: {difference}. Keep one bank per P and base model.")
