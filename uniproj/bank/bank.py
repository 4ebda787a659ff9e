"""`AdapterBank`: the theta_d of thousands of users of one P, in one folder that many processes read and write."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeGuard
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from uniproj.adapters import file as adapter_file
from uniproj.adapters.fit import warn_of_another_base
from uniproj.adapters.header import Header
from uniproj.adapters.tensors import THETA_D, check_numbers
from uniproj.bank.attached import (
    active_adapter,
    check_same,
    header_of,
    layers_of,
    read_adapter,
    refuse_merged,
    tuner_of,
)
from uniproj.bank.index import Change, Entry, Index
from uniproj.bank.slots import Slots
from uniproj.errors import AdapterError

VECTORS, INDEX = "theta_d.safetensors", "index.sqlite"
# vectors that are written between two calls of the disk
_CHUNK = 256

Source = Tensor | nn.Module | str | Path


class AdapterBank:
    """name -> theta_d (d,) float32, for any number of adapters of one fixed P on one base.

    A folder of two files: `theta_d.safetensors`, a memory-mapped tensor (slots, d) whose metadata is the header of P,
    and `index.sqlite`, which says what slot holds what name. Opening reads neither of them through, and selecting an
    adapter costs a copy of d numbers and one projection, whatever the count of adapters.

    Every change is whole or did not happen, also where the process dies: new numbers go into a slot that no name uses,
    are brought to the disk, and the names change in one transaction. Readers wait for no writer; writers wait for each
    other. The folder must lie on a local disk (SQLite's write-ahead mode shares memory), and is copied while nobody
    writes. The file never shrinks: a deleted adapter leaves its slot to the next one.

    Raises AdapterError for a folder that is no bank, an unknown name, an adapter of another P or with numbers beside
    theta_d, and for a disk that is full; the bank is then as it was.
    """

    def __init__(self, folder: str | Path):
        # absolute: a process may change its working directory
        self.folder = _path(folder)
        with _disk(self.folder):
            self._slots = Slots(self.folder / VECTORS)
        header = Header.from_metadata(self._slots.metadata, str(self.folder / VECTORS))
        if header is None or header.d != self._slots.d:
            raise AdapterError(
                f"bank: {self.folder} must hold the header of its P, got none. Bring it back from a copy."
            )
        self.header = header
        self._index = Index(self.folder / INDEX)
        # P of each model that fits -> its layers, for which no second selection walks the model
        self._fitting: WeakKeyDictionary[nn.Module, WeakSet[LoraLayer]] = WeakKeyDictionary()
        if (known := self._index.slots()) > len(self._slots):
            raise AdapterError(
                f"bank: {self.folder / VECTORS} must have {known} slots, got {len(self._slots)}: it is cut off, or "
                "another bank's. Bring the whole folder back from a copy."
            )

    @classmethod
    def create(cls, folder: str | Path, source: nn.Module | str | Path) -> AdapterBank:
        """A new, empty bank for the P of a model's active adapter, or of a saved adapter."""
        folder = _path(folder)
        header, _ = read_adapter(source, "the source of P", "a model")
        part = folder.with_name(f".{folder.name}.{os.getpid()}")
        with _disk(folder):
            if folder.exists():
                raise AdapterError(f"bank: {folder} must not exist yet, got one. Open it with AdapterBank(folder).")
            part.mkdir(parents=True)
            try:
                Slots.create(part / VECTORS, header.d, header.to_metadata())
                Index.create(part / INDEX)
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        return cls(folder)

    # ---- reading ----------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The names of all adapters, sorted."""
        return self._index.names()

    def __len__(self) -> int:
        return self._index.count()

    def __contains__(self, name: object) -> bool:
        return _is_name(name) and self._index.find(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def get(self, name: str) -> Tensor:
        """A copy of one theta_d, (d,) float32."""
        while True:
            entry = self._entry(name)
            row = self._slots.read(entry.slot)
            # the slot may have been given to another while it was copied: then the name has a new version
            if self._index.find(name) == entry:
                break
        if _crc(row) != entry.crc:
            raise AdapterError(
                f"bank: the numbers of {name!r} must be those that were written, got others (CRC-32 differs). "
                f"{self.folder / VECTORS} was altered: bring the folder back from a copy, or replace the adapter."
            )
        return torch.from_numpy(row)

    def get_many(self, names: Sequence[str]) -> Tensor:
        """(K, d) float32, one row per name. Raises AdapterError for no name at all."""
        if not names:
            raise AdapterError("bank: at least one name is needed, got none. See bank.names().")
        return torch.stack([self.get(name) for name in names])

    def batch(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(thetas (K, d), rows (n,)) for `mixed`, so that row i of a batch uses names[i]; each vector is read once."""
        once = {name: position for position, name in enumerate(dict.fromkeys(map(_checked, names)))}
        return self.get_many(list(once)), torch.tensor([once[name] for name in names])

    def select(self, model: nn.Module, name: str) -> None:
        """Let the active adapter of a model be this one: a copy of d numbers into its theta_d and one projection.

        The adapter may be disabled, but not merged.
        """
        tuner = tuner_of(model, "bank.select")
        adapter_name = active_adapter(tuner, "bank.select")
        projection = tuner.projections[adapter_name]
        if projection not in self._fitting:
            check_same(self.header, header_of(tuner, adapter_name), "the model's adapter")
            warn_of_another_base(
                self.header, getattr(tuner.model, "name_or_path", None), getattr(tuner.model, "config", None)
            )
            self._fitting[projection] = WeakSet(layers_of(tuner, adapter_name))
        refuse_merged(self._fitting[projection], "bank.select")
        theta = self.get(name)
        with torch.no_grad():
            tuner.uniproj_theta_d[adapter_name].copy_(theta)
            tuner._sources[adapter_name].refresh()

    def export(self, name: str, folder: str | Path) -> None:
        """Write one adapter as a folder of its own, which `PeftModel.from_pretrained` loads.

        Raises AdapterError for zeros where c = 0, which are the base model and which no loading takes.
        """
        tensors = {THETA_D: self.get(name)}
        try:
            check_numbers(tensors, self.header.projection)
        except AdapterError as error:
            raise AdapterError(f"bank.export of {name!r}: {error}") from None
        config = adapter_file.config_of(self.header, folder)
        adapter_file.write(folder, tensors, self.header, config)

    # ---- writing ----------------------------------------------------------------------------------

    def add(self, name: str, source: Source) -> None:
        """Keep a new adapter: a vector (d,), the active adapter of a model, or a saved adapter's folder."""
        self.add_many([(name, source)])

    def add_many(self, adapters: Mapping[str, Source] | Iterable[tuple[str, Source]]) -> None:
        """Keep new adapters, all of them or none; of an iterable no more than 256 vectors are held at a time."""
        pairs = iter(adapters.items() if isinstance(adapters, Mapping) else adapters)
        with self._index.change() as change:
            while chunk := [(_checked(name), self._vector(source, name)) for name, source in islice(pairs, _CHUNK)]:
                # not around the pairs: an error of the caller's own disk is the caller's
                with _disk(self.folder):
                    self._put(change, chunk, replacing=False)

    def replace(self, name: str, source: Source) -> None:
        """Give a name that is held other numbers; who reads it meanwhile gets the old ones or the new ones, whole."""
        row = self._vector(source, _checked(name))
        with _disk(self.folder), self._index.change() as change:
            self._put(change, [(name, row)], replacing=True)

    def delete(self, name: str) -> None:
        """Forget an adapter; its slot serves the next one."""
        with self._index.change() as change:
            if not change.remove(_checked(name)):
                raise self._unknown(name)

    def close(self) -> None:
        """Let go of the database; the next use opens it again."""
        self._index.close()

    def _put(self, change: Change, chunk: Sequence[tuple[str, np.ndarray]], replacing: bool) -> None:
        free = change.free(len(chunk))
        known = change.slots()
        there = self._slots.reserve(known + len(chunk) - len(free))
        if there > known:
            change.add_free(range(known, there))
            free = change.free(len(chunk))
        self._slots.write((slot, row) for slot, (_, row) in zip(free, chunk, strict=True))
        for slot, (name, row) in zip(free, chunk, strict=True):
            # only now: a slot that is freed here is read by others until the commit
            if change.remove(name) != replacing:
                raise self._unknown(name) if replacing else self._held(name)
            change.put(name, slot, _crc(row))

    def _vector(self, source: Source, name: str) -> np.ndarray:
        if not isinstance(source, Tensor):
            header, source = read_adapter(source, f"the adapter {name!r}", "a tensor (d,), a model")
            check_same(self.header, header, f"the adapter {name!r}")
        if source.shape != (self.header.d,) or not source.is_floating_point():
            raise AdapterError(
                f"bank: theta_d of {name!r} must be floats of shape (d,) = ({self.header.d},), got {source.dtype} of "
                f"shape {tuple(source.shape)}. Pass the vector of an adapter of this bank's P."
            )
        row = source.detach().to("cpu", torch.float32, copy=True)
        if not torch.isfinite(row).all():
            raise AdapterError(
                f"bank: theta_d of {name!r} must be finite in float32, got NaN or inf. Use another checkpoint."
            )
        return row.numpy()

    def _entry(self, name: str) -> Entry:
        entry = self._index.find(_checked(name))
        if entry is None:
            raise self._unknown(name)
        return entry

    def _held(self, name: str) -> AdapterError:
        return AdapterError(f"bank: {name!r} must be a new name, got one that {self.folder} holds. Use bank.replace.")

    def _unknown(self, name: str) -> AdapterError:
        return AdapterError(
            f"bank: {self.folder} must hold the name {name!r}, got none. See bank.names(), or use bank.add."
        )


def _path(folder: str | Path) -> Path:
    if not isinstance(folder, str | Path):
        raise AdapterError(f"bank: folder must be a path, got a {type(folder).__name__}. Pass a str or a Path.")
    return Path(folder).absolute()


def _is_name(name: object) -> TypeGuard[str]:
    # a lone surrogate is no text that a database could hold
    return isinstance(name, str) and name != "" and name.encode(errors="replace").decode() == name


def _checked(name: str) -> str:
    if not _is_name(name):
        raise AdapterError(f"bank: a name must be valid text of at least one letter, got {name!r:.80}. Choose another.")
    return name


def _crc(row: np.ndarray) -> int:
    return zlib.crc32(row.data)


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            remedy = "Check the path, or bring the whole folder back from a copy."
        else:
            remedy = "Nothing saved before is lost: check the path, or free some space, and try again."
        raise AdapterError(
            f"bank: {folder} must be a folder that can be read and written, got: {error}. {remedy}"
        ) from error
