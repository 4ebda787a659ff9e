"""Foreign formats by name: every file of `formats/`, every entry point of `uniproj.formats`, and what plugins register.

A file is named as its format, so that names are known without importing it, which would import PEFT and Transformers.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from uniproj.errors import AdapterError

if TYPE_CHECKING:
    from uniproj.exchange.adapter import Adapter, LoRAAdapter

ENTRY_POINTS = "uniproj.formats"
_HOMES = [str(Path(__file__).parent / "formats")]


class Format:
    """What `export` writes and `import` reads; a subclass overrides `write`, or `reads` and `read`, or all three.

    takes_rank: whether `write` can pad every module to a rank; suffix: what the name must end in where it is one file;
    weights: the pattern of the names of files that hold its numbers where it is a folder.
    """

    name = ""
    takes_rank = False
    suffix = ""
    weights = "adapter_model.*"

    def write(self, adapter: Adapter, folder: Path, rank: int | None) -> None:
        """Write an adapter with the same updates. Raises AdapterError for what the format cannot say."""
        raise AdapterError(f"export: to must be a format that can be written, got {self.name!r}. Choose another.")

    def reads(self, folder: Path) -> bool:
        """Whether a folder holds an adapter of this format."""
        return False

    def read(self, folder: Path, base: str | nn.Module | None, trust_remote_code: bool) -> Adapter | LoRAAdapter:
        """The adapter in a folder, with the same updates. Raises AdapterError for one that is not as it must be.

        base: the base model or its name; trust_remote_code: whether Python code that comes with a model of this name
        may run.
        """
        raise AdapterError(f"import: {self.name} must be a format that can be read. Convert the adapter to LORA first.")


_formats: dict[str, Format] = {}
F = TypeVar("F", bound=type[Format])


def register(name: str) -> Callable[[F], F]:
    """Class decorator that gives a Format its name. Raises AdapterError for a name that another class has."""

    def decorate(cls: F) -> F:
        known = type(_formats[name]) if name in _formats else cls
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise AdapterError(
                f"register: the format {name!r} is that of {known.__module__}.{known.__qualname__}. Choose another."
            )
        cls.name = name
        _formats[name] = cls()
        return cls

    return decorate


def _files() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(_HOMES) if not module.name.startswith("_")]


def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


def names() -> list[str]:
    """Every known format, sorted."""
    return sorted({*_files(), *_entries(), *_formats})


def get(name: str) -> Format:
    """The format of a name. Raises AdapterError for an unknown one, and for one whose package cannot be imported."""
    if name in _formats:
        return _formats[name]
    if name in _files():
        importlib.import_module(f"uniproj.exchange.formats.{name}")
        return _formats[name]
    if (entry := _entries().get(name)) is None:
        raise AdapterError(f"export: to must be one of {', '.join(names())}, got {name!r}.")
    try:
        found = entry.load()
        if not (isinstance(found, type) and issubclass(found, Format)):
            raise TypeError(f"{found!r} is no subclass of Format")
        register(name)(found)
    except Exception as error:  # anything may go wrong in somebody else's package
        raise AdapterError(
            f"format {name!r}: {entry.value} must be a class that can be imported, got {error!r}. Repair or remove "
            "that package."
        ) from error
    return _formats[name]


def every() -> Iterator[Format]:
    """Every format; of one whose package cannot be imported a warning."""
    for name in names():
        try:
            yield get(name)
        except AdapterError as error:
            warnings.warn(str(error), stacklevel=2)
