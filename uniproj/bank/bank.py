"""`AdapterBank`: the theta_d of thousands of users of one P, in one folder that many processes read and write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeGuard, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from uniproj.bank.adapter import (
    active_adapter,
    check_same,
    header_of,
    layers_of,
    read_adapter,
)
from uniproj.bank.backup import copy, forget_deleted
from uniproj.bank.folder import RESTORE, appearing, disk
from uniproj.bank.index import Change, Index
from uniproj.bank.slots import Slots, crc
from uniproj.bank.spool import Spool
from uniproj.errors import AdapterError
from uniproj.format import card
from uniproj.format.compatibility import warn_of_another_base
from uniproj.format.file import SavedAdapter, config_of, write
from uniproj.format.header import Header
from uniproj.format.keys import THETA_D
from uniproj.format.tensors import check_numbers
from uniproj.hub import Upload, apart, measured, upload
from uniproj.tuner import adapter_of
from uniproj.tuner.attached import tuner_of
from uniproj.tuner.config import UniProjConfig
from uniproj.tuner.merging import refuse_merged

VECTORS, INDEX = "theta_d.safetensors", "index.sqlite"
# bytes of the longest name
_LONGEST = 2**16

Source = Tensor | nn.Module | str | Path
_Found = TypeVar("_Found", list[str], int)


class AdapterBank:
    """name -> theta_d (d,) float32, for any number of adapters of one fixed P on one base.

    A folder of two files: `theta_d.safetensors`, a tensor (slots, d) whose metadata is the header of P, and
    `index.sqlite`, which says what slot holds what name. Opening a bank does not read them whole, and selecting an
    adapter costs a copy of d numbers and one projection, however many adapters there are.

    Every change is atomic, even if the process dies: new numbers are written to a slot that no name uses and flushed to
    the disk, and then the names change in one transaction. Readers never wait; writers wait for each other. The folder
    must lie on a local disk (SQLite's write-ahead mode shares memory), and is copied by `backup`. Without write
    permission a bank can still be read. The file never shrinks: the slot of a deleted adapter is reused.

    Raises AdapterError for a folder that is no bank, files that are replaced while they are open or were copied without
    their last changes, an unknown name, an adapter of another P or with numbers beside theta_d, and for a disk that is
    full; the bank is then as it was.
    """

    def __init__(self, folder: str | Path):
        # absolute: a process may change its working directory
        self.folder = _path(folder)
        with disk(self.folder):
            self._slots = Slots(self.folder / VECTORS)
        header = Header.from_metadata(self._slots.metadata, str(self.folder / VECTORS))
        if header is None or header.d != self._slots.d:
            raise AdapterError(f"bank: {self.folder} must hold the header of its P, got none. {RESTORE}")
        self.header = header
        self._index = Index(self.folder / INDEX, self._slots.written)
        # P of each model that was checked -> its LoRA layers, so that selecting again does not walk the model
        self._layers: WeakKeyDictionary[nn.Module, WeakSet[LoraLayer]] = WeakKeyDictionary()
        if (known := self._index.slots()) > len(self._slots):
            raise AdapterError(
                f"bank: {self.folder / VECTORS} must have {known} slots, got {len(self._slots)}: it is cut off, or "
                f"another bank's. {RESTORE}"
            )

    @classmethod
    def create(cls, folder: str | Path, source: nn.Module | str | Path) -> AdapterBank:
        """A new, empty bank for the P of a model's active adapter, or of a saved adapter."""
        folder = _path(folder)
        header, _ = read_adapter(source, "the source of P", "a model")
        with appearing(folder) as part, disk(folder):
            Slots.create(part / VECTORS, header.d, header.to_metadata())
            Index.create(part / INDEX)
        return cls(folder)

    # ---- reading ----------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The names of all adapters, sorted."""
        return self._all(self._index.names, len)

    def __len__(self) -> int:
        return self._all(self._index.count, int)

    def __contains__(self, name: object) -> bool:
        return _is_name(name) and self._index.find(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def get(self, name: str) -> Tensor:
        """A copy of one theta_d, (d,) float32."""
        while True:
            entry = self._index.find(_checked(name), sure=False)
            row = None if entry is None else self._slots.read(entry.slot)
            # the slot may have been given to another while it was copied: then the name has a new version
            if self._index.find(name) == entry:
                break
        if entry is None or row is None:
            raise self._unknown(name)
        self._slots.check()
        if crc(row) != entry.crc:
            raise self._slots.altered(name)
        if not np.isfinite(row).all():
            raise AdapterError(
                f"bank: the numbers of {name!r:.80} must be finite, got NaN or inf, which no bank takes. "
                "Do not use this adapter: replace or delete it."
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
        """Make the active adapter of a model this one: copies d numbers into its theta_d.

        On the CPU, and within `generate`, it projects them too, once; elsewhere every call of the model does so.

        The adapter may be disabled, but not merged.
        """
        tuner = tuner_of(model, "bank.select")
        adapter_name = active_adapter(tuner, "bank.select")
        projection, theta_d = adapter_of(tuner, adapter_name)
        if projection not in self._layers:
            check_same(self.header, header_of(tuner, adapter_name), "the model's adapter")
            warn_of_another_base(
                self.header, getattr(tuner.model, "name_or_path", None), getattr(tuner.model, "config", None)
            )
            self._layers[projection] = WeakSet(layers_of(tuner, adapter_name))
        refuse_merged(self._layers[projection], "bank.select")
        numbers = self.get(name)
        with torch.no_grad():
            theta_d.copy_(numbers)
            tuner._sources[adapter_name].refresh()

    def export(self, name: str, folder: str | Path) -> None:
        """Write one adapter as a folder of its own, which `PeftModel.from_pretrained` loads.

        Raises AdapterError for theta_d = 0 where c = 0: that is the bare base model, which loading refuses.
        """
        tensors = {THETA_D: self.get(name)}
        try:
            check_numbers(tensors, self.header.projection)
        except AdapterError as error:
            raise AdapterError(f"bank.export of {name!r}: {error}") from None
        saved = SavedAdapter(config_of(self.header), self.header, tensors)
        write(folder, tensors, self.header, UniProjConfig.of_saved(saved, folder).to_dict())

    # ---- writing ----------------------------------------------------------------------------------

    def add(self, name: str, source: Source) -> None:
        """Add a new adapter: a vector (d,), the active adapter of a model, or a saved adapter's folder."""
        self.add_many([(name, source)])

    def add_many(self, adapters: Mapping[str, Source] | Iterable[tuple[str, Source]]) -> None:
        """Add new adapters, all or none, in one transaction that begins once the iterable is exhausted.

        So the iterable itself may read and write this bank, wait for other threads, and fork, but a child process may
        not continue it. At most 256 vectors are held in memory; the others wait in an unnamed temporary file in the
        bank's folder, which takes as much space again.
        """
        with closing(Spool(self.folder)) as spool:
            for name, source in adapters.items() if isinstance(adapters, Mapping) else adapters:
                spool.append(_checked(name), self._vector(source, name))
            with disk(self.folder), self._change() as change:
                for chunk in spool.chunks():
                    self._put(change, chunk, replacing=False)

    def replace(self, name: str, source: Source) -> None:
        """Replace the numbers of a known name; a reader gets the old vector or the new one, never a mix."""
        row = self._vector(source, _checked(name))
        with disk(self.folder), self._change() as change:
            self._put(change, [(name, row)], replacing=True)

    def delete(self, name: str) -> None:
        """Delete an adapter; its slot is reused."""
        with self._change() as change:
            if not change.remove(_checked(name)):
                raise self._unknown(name)

    def backup(self, folder: str | Path) -> None:
        """Copy the bank as it is at one moment to a new folder, while others read and write it.

        All numbers are read and compared with their CRC-32. The folder appears whole or not at all, and is on the disk
        when this returns. A bank that may not be written can be copied, too.
        """
        folder = _path(folder)
        with appearing(folder) as part, disk(folder):
            copy(self._index, self._slots, part / INDEX, part / VECTORS)

    def push_to_hub(self, repo: str, base_model: str | None = None, **options: Any) -> Upload:
        """Upload the bank as it is at one moment, with every name in it, as a repository with a card.

        base_model: the name of its base on the Hub, where the header has none or that of a place on this machine;
        options: of `uniproj.hub.upload`, such as private and dry_run. Raises AdapterError as `backup` and `upload` do.
        """
        header = card.published(self.header, base_model)
        with apart() as folder:
            with disk(folder):
                copy(self._index, self._slots, folder / INDEX, folder / VECTORS, header.to_metadata())
                forget_deleted(folder / INDEX)
                with closing(AdapterBank(folder)) as copied:
                    count = len(copied)
            size = sum(path.stat().st_size for path in folder.iterdir())
            known = (count, size, measured(header))
            return upload(folder, repo, lambda name: card.of_bank(header, name, *known), **options)

    def close(self) -> None:
        """Close the database; the next use opens it again."""
        self._index.close()

    @contextmanager
    def _change(self) -> Iterator[Change]:
        self._slots.check()
        with self._index.change() as change:
            yield change
            last = change.last()
        # the change is committed already, so failing to note it here loses nothing
        with suppress(OSError):
            self._slots.note(last)

    def _put(self, change: Change, chunk: Sequence[tuple[str, np.ndarray]], replacing: bool) -> None:
        free = change.free(len(chunk))
        known = change.slots()
        there = self._slots.reserve(known + len(chunk) - len(free))
        if there > known:
            change.add_free(range(known, there))
            free = change.free(len(chunk))
        self._slots.write((slot, row) for slot, (_, row) in zip(free, chunk, strict=True))
        for slot, (name, row) in zip(free, chunk, strict=True):
            # only after the write: until the commit, others still read the slot that is freed here
            if change.remove(name) != replacing:
                raise (
                    self._unknown(name)
                    if replacing
                    else AdapterError(
                        f"bank: {name!r} must be a new name, got one that {self.folder} holds. Use bank.replace."
                    )
                )
            change.put(name, slot, crc(row))

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

    def _all(self, found: Callable[[int], _Found], count: Callable[[_Found], int]) -> _Found:
        """The answer to a query with a limit: no bank has more names than slots, but a forged index may."""
        while True:
            most = len(self._slots) + 1
            if count(answer := found(most)) < most:
                return answer
            if len(self._slots) < most:
                raise AdapterError(
                    f"bank: {self.folder / INDEX} must have no more names than the {len(self._slots)} slots of "
                    f"{VECTORS}, got more. {RESTORE}"
                )

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
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST:
        return False
    return len(encoded := name.encode(errors="replace")) <= _LONGEST and encoded.decode() == name


def _checked(name: str) -> str:
    if not _is_name(name):
        raise AdapterError(
            f"bank: a name must be valid text of at least one letter and at most {_LONGEST:,} bytes, got {name!r:.80}. "
            "Choose another."
        )
    return name
