"""Adapters to and from foreign formats, compression, and the commands that inspect, verify and restore an adapter.

The names below are imported on first use, as PEFT and Transformers take seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uniproj.exchange.adapter import Adapter, LoRAAdapter
    from uniproj.exchange.convert import from_peft, to_peft
    from uniproj.exchange.registry import Format, register
    from uniproj.exchange.transfer import export, import_adapter

__all__ = ["Adapter", "Format", "LoRAAdapter", "export", "from_peft", "import_adapter", "register", "to_peft"]
_HOMES = {
    **dict.fromkeys(("Adapter", "LoRAAdapter"), "adapter"),
    **dict.fromkeys(("from_peft", "to_peft"), "convert"),
    **dict.fromkeys(("Format", "register"), "registry"),
    **dict.fromkeys(("export", "import_adapter"), "transfer"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
