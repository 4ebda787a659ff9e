"""An adapter on disk: `adapter_config.json` and `adapter_model.safetensors`, validated before anything uses them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from torch import Tensor

from uniproj.errors import AdapterError, ProjectionError, shown
from uniproj.format import identity, schema
from uniproj.format.disk import exists, opened, read_json, replace
from uniproj.format.fields import DEFAULT_PROJECTION, FREE, Configuration, check_fields
from uniproj.format.header import PREFIX, Header
from uniproj.format.heads import entitled
from uniproj.format.keys import IDENTITY, OWN, THETA_D, in_this_format
from uniproj.format.remap import new_names
from uniproj.format.tensors import (
    check_digest,
    check_numbers,
    check_shapes,
    open_weights,
    serialise,
    shapes_without_P,
)

CONFIG, WEIGHTS, UNSAFE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
KIND = "UNIPROJ"
_FIRST_BYTES = 2**16
_FIRST_WITH_IDENTITY = 3
_RESTORE = "Restore it (python -m uniproj restore {})"


# the adapters that were read within `read_once`
_known: ContextVar[dict[Path, SavedAdapter] | None] = ContextVar("known", default=None)


@dataclass(frozen=True)
class SavedAdapter:
    """One adapter as it is on disk; its tensors without the identity, which `header` holds in full.

    config: the fields of its configuration, as JSON has them. `header` is None for a file written before format 1.
    """

    config: dict[str, Any]
    header: Header | None
    tensors: dict[str, Tensor]

    @property
    def theta_d(self) -> Tensor:
        """The trained vector, (d,), in the dtype in which it was saved."""
        return self.tensors[THETA_D]


def read(folder: str | Path) -> SavedAdapter:
    """The adapter in a folder, on the CPU, after every check that needs no model.

    Raises AdapterError, which names the first thing that is not as it must be: a folder without the two files, or with
    adapter_model.bin alone (opening one can run code, so it stays closed); a file that is not a regular one, cut off or
    altered; a header of a later format; a projection that is a path, unknown, or of another version; another dtype,
    shape, NaN, inf; theta_d = 0 where c = 0; a configuration that contradicts the header; a tensor that an adapter of
    this configuration does not train.
    """
    folder, known = Path(folder), _known.get()
    if known is not None and folder in known:
        return known[folder]
    _check_folder(folder)
    fields = _fields(folder / CONFIG)
    header, tensors = _weights(folder)
    if header is None:
        saved = _read_without_header(folder, fields, tensors)
    else:
        _check_agreement(fields, header, folder)
        saved = SavedAdapter(_merged(fields, header), header, tensors)
    if known is not None:
        known[folder] = saved
    return saved


@contextmanager
def read_once() -> Iterator[None]:
    """Within the block `read` opens a folder once and then repeats its answer, so that all parts are of one moment."""
    known = _known.get()
    token = _known.set({} if known is None else known)
    try:
        yield
    finally:
        _known.reset(token)


def write(folder: str | Path, tensors: Mapping[str, Tensor], header: Header, config: Mapping[str, Any]) -> None:
    """Write both files of an adapter, or none: a crash or a full disk leaves those of before.

    tensors: `base_model.uniproj_theta_d` (d,), `base_model.uniproj_projections.*` of a learned P, and heads by PEFT's
    names; the identity that ties them to `header` is added. Raises AdapterError for what `read` would refuse, and
    where the disk refuses.
    """
    check(folder, tensors, header, config)
    noted = {**config, **_of_P(header)}
    if noted.get("base_model_name_or_path") is None:
        noted["base_model_name_or_path"] = header.base_model
    weights = serialise({**tensors, IDENTITY: identity.encode(header)}, header.to_metadata())
    replace({Path(folder) / WEIGHTS: weights, Path(folder) / CONFIG: config_text(noted).encode()})


def check(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    header: Header,
    config: Mapping[str, Any],
    has_offset: bool | None = None,
) -> None:
    """Raises AdapterError for tensors that `read` would refuse, so that they are not written.

    has_offset: whether P has a c, where that is known; else what its class says.
    """
    try:
        shapes = shapes_without_P(tensors, header.projection, header.d)
        check_shapes(tensors, shapes, header.projection)
        check_numbers(tensors, header.projection, has_offset)
        _kept(tensors, config, header, "the adapter")
    except AdapterError as error:
        raise AdapterError(f"{folder}: nothing was saved, and what lies there stays as it was: {error}") from None


def of_weights(folder: str | Path) -> SavedAdapter:
    """The adapter that the weights in a folder describe, whatever configuration lies beside them.

    Raises AdapterError for weights that `read` refuses, or that have no header to tell a configuration.
    """
    folder = Path(folder)
    header, tensors = _weights(folder)
    if header is None:
        raise AdapterError(
            f"{folder / WEIGHTS}: must hold the header of an adapter of uniproj, got none. Take the original."
        )
    return SavedAdapter(config_of(header), header, tensors)


def config_of(header: Header) -> dict[str, Any]:
    """The fields of the configuration that a header describes, for an adapter that has no configuration file yet."""
    return _merged({"base_model_name_or_path": header.base_model, "revision": header.base_revision}, header)


def locate(model_id: str | Path, subfolder: str | None = None, **hub: Any) -> Path:
    """The folder of an adapter: a local one as it is, else both files from the hub, in its cache."""
    local = Path(model_id, subfolder) if subfolder else Path(model_id)
    if exists(local):
        return local
    try:
        found = [hf_hub_download(str(model_id), name, subfolder=subfolder, **hub) for name in (CONFIG, WEIGHTS)]
    except Exception as error:  # offline, no such repository, no safetensors in it: a library with many kinds of error
        raise AdapterError(
            f"{model_id}: must be a folder or a repository with {CONFIG} and {WEIGHTS}, got {error}. Check the name."
        ) from error
    return Path(found[0]).parent


def unsafe(folder: Path) -> AdapterError:
    """The error for writing a file that can run code, or beside one."""
    return AdapterError(
        f"{folder}: must not hold {UNSAFE}, which uniproj never opens, as that can run code. "
        "Remove it and save with safe_serialization=True."
    )


def refuse_unsafe(folder: Path) -> None:
    """Raises AdapterError for a folder with a file of weights that can run code."""
    if exists(folder / UNSAFE):
        raise unsafe(folder)


def has_our_weights(folder: Path) -> bool:
    """Whether the weights in a folder begin as those of a uniproj adapter do."""
    try:
        with opened(folder / WEIGHTS) as file:
            return PREFIX.encode() in file.read(_FIRST_BYTES)
    except AdapterError:
        return False


def has_our_config(folder: Path) -> bool:
    """Whether the configuration in a folder is that of a uniproj adapter."""
    try:
        return dict(read_json(folder / CONFIG)).get("peft_type") == KIND
    except (ValueError, TypeError):
        return False


def is_template(folder: Path) -> bool:
    """Whether a folder holds a configuration that never belonged to trained numbers."""
    if exists(folder / WEIGHTS) or exists(folder / UNSAFE) or not exists(folder / CONFIG):
        return False
    return _fields(folder / CONFIG).get("layout_fingerprint") is None


def _weights(folder: Path) -> tuple[Header | None, dict[str, Tensor]]:
    """Header and tensors of the weights, after every check that needs neither model nor configuration."""
    where = str(folder / WEIGHTS)
    with open_weights(folder / WEIGHTS) as file:
        header = Header.from_metadata(file.metadata, where)
        if header is not None:
            # everything that bounds the sizes, before any number is read
            header.check_version(where)
            index = {in_this_format(name): tensor for name, tensor in file.index.items()}
            check_shapes(index, header.shapes(index, where), header.projection)
            config = config_of(header)
            _check_fields(config, folder)
            kept = _kept(index, config, header, where)
        written = file.read()
    tensors = {in_this_format(name): tensor for name, tensor in written.items()}
    if header is None:
        return None, tensors
    check_digest(written, file.metadata, where)
    _check_identity(tensors.pop(IDENTITY, None), header, where)
    check_numbers(tensors, header.projection)
    return header, {name: tensors[name] for name in kept}


def _check_fields(config: Mapping[str, Any], folder: Path) -> None:
    try:
        check_fields(config, f"{folder / CONFIG}: ")
    except ProjectionError as error:
        raise AdapterError(f"{folder / CONFIG}: {error}") from error


def _kept(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], header: Header | None, where: str
) -> dict[str, Tensor]:
    """The tensors of P without the identity, and those beside it that `heads.entitled` allows.

    A file without a header does not list the adapted modules.
    """
    of_P = {name: tensor for name, tensor in tensors.items() if name.startswith(OWN) and name != IDENTITY}
    beside = {name: tensor for name, tensor in tensors.items() if not name.startswith(OWN)}
    modules = None if header is None else new_names(header.layout, config.get("remap") or []).values()
    return of_P | entitled(beside, config, modules, where)


def _check_identity(found: Tensor | None, header: Header, where: str) -> None:
    if found is None and header.format_version >= _FIRST_WITH_IDENTITY:
        raise AdapterError(f"{where}: must hold the tensor {IDENTITY}, got none. Copy or download it again.")
    if found is not None and (differs := identity.difference(found, header)):
        raise AdapterError(f"{where}: the header must be that of the numbers: {differs}. Take the original.")


def config_text(fields: Mapping[str, Any]) -> str:
    """A configuration as it is saved; equal ones give equal text."""
    # the first pattern that fits a module decides its rank, so the order within a field stays
    plain = {key: sorted(v) if isinstance(v := fields[key], set) else v for key in sorted(fields)}
    return json.dumps(plain, indent=2)


def _check_folder(folder: Path) -> None:
    if not exists(folder) or not folder.is_dir():
        raise AdapterError(f"{folder}: must be a folder with {CONFIG} and {WEIGHTS}, got none. Check the path.")
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).exists()]
    if missing and (folder / UNSAFE).exists():
        raise AdapterError(
            f"{folder}: must hold {WEIGHTS}, got {UNSAFE}, which can run code when it is opened and is not. "
            "Save the adapter as safetensors."
        )
    if missing:
        raise AdapterError(
            f"{folder}: must hold {CONFIG} and {WEIGHTS}, got no {missing[0]}. {_remedy(folder, missing)}."
        )


def _remedy(folder: Path, missing: Sequence[str]) -> str:
    if missing == [CONFIG] and has_our_weights(folder):
        return _RESTORE.format(folder)
    # PEFT saves an adapter under a folder of its name, unless it is called `default`
    named = ", ".join(shown(path.parent.name) for path in sorted(folder.glob(f"*/{CONFIG}")))
    return f"Name the folder of one of the adapters in it: {named}" if named else "Check the path"


def _fields(path: Path) -> dict[str, Any]:
    fields = read_json(path)
    kind = fields.get("peft_type") if isinstance(fields, dict) else None
    if kind != KIND:
        raise AdapterError(f"{path}: peft_type must be {KIND}, got {kind!r}. It is an adapter of another method.")
    schema.check(Configuration, fields, f"{path}: ")
    return dict(fields)


def _of_P(header: Header) -> dict[str, Any]:
    """The fields of a configuration that describe P, from the header; d apart, which a configuration may leave out."""
    return {
        "format_version": header.format_version,
        "projection": header.projection,
        "projection_seed": header.projection_seed,
        "projection_kwargs": header.projection_kwargs,
        "layout_fingerprint": header.layout.fingerprint,
        "projection_checksum": header.checksum,
    }


def _check_agreement(fields: Mapping[str, Any], header: Header, folder: Path) -> None:
    of_P = _of_P(header) | ({} if fields.get("d") is None else {"d": header.d})
    for key, wanted in {**of_P, **header.settings}.items():
        if key not in fields or json.dumps(fields[key]) != json.dumps(wanted):
            raise AdapterError(
                f"{folder / CONFIG}: {key} must be {wanted!r} as in the header of {WEIGHTS}, got "
                f"{fields.get(key, 'none')!r}. {_RESTORE.format(folder)}; to change what leaves the updates as they "
                "are, such as lora_dropout, pass a changed UniProjConfig.from_pretrained as config= and save anew."
            )


def _merged(fields: Mapping[str, Any], header: Header) -> dict[str, Any]:
    """The configuration that the header describes; of the file beside it only the FREE fields count."""
    free = {key: fields[key] for key in FREE if key in fields}
    return {**header.settings, **_of_P(header), "d": header.d, "peft_type": KIND, **free}


def _read_without_header(folder: Path, fields: dict[str, Any], tensors: dict[str, Tensor]) -> SavedAdapter:
    if fields.get("format_version") is not None:
        raise AdapterError(
            f"{folder / WEIGHTS}: must hold a header in its metadata, as {CONFIG} says (format "
            f"{fields['format_version']}), got none. Another tool rewrote the file: take the original."
        )
    _check_fields(fields, folder)
    projection, theta_d = fields.setdefault("projection", DEFAULT_PROJECTION), tensors.get(THETA_D)
    size = fields.get("d") or (0 if theta_d is None else theta_d.numel())
    check_shapes(tensors, shapes_without_P(tensors, projection, size), projection)
    check_numbers(tensors, projection)
    return SavedAdapter(fields, None, _kept(tensors, fields, None, str(folder / WEIGHTS)))
