"""An adapter on disk: `adapter_config.json` and `adapter_model.safetensors`, validated before anything uses them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download
from torch import Tensor

from uniproj.adapters import identity, schema
from uniproj.adapters import tensors as stored
from uniproj.adapters.disk import exists, opened, read_json, replace
from uniproj.adapters.header import FREE, PREFIX, Header
from uniproj.adapters.heads import entitled
from uniproj.adapters.remap import new_names
from uniproj.errors import AdapterError, ProjectionError

if TYPE_CHECKING:
    from uniproj.tuner.config import UniProjConfig

CONFIG, WEIGHTS, UNSAFE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
KIND = "UNIPROJ"
_FIRST_BYTES = 2**16
_FIRST_WITH_IDENTITY = 3
_RESTORE = "Restore it (python -m uniproj restore {})"


@dataclass(frozen=True)
class SavedAdapter:
    """One adapter as it lies on disk: its tensors without the identity, which `header` says in full.

    `header` is None for a file written before format 1.
    """

    config: UniProjConfig
    header: Header | None
    tensors: dict[str, Tensor]

    @property
    def theta_d(self) -> Tensor:
        """The trained vector, (d,), in the dtype in which it was saved."""
        return self.tensors[stored.THETA_D]


def read(folder: str | Path) -> SavedAdapter:
    """The adapter in a folder, on the CPU, after every check that needs no model.

    Raises AdapterError, which names the first thing that is not as it must be: a folder without the two files, or with
    adapter_model.bin alone (opening one can run code, so it stays closed); a file that is no regular one, cut off or
    altered; a header of a later format; a projection that is a path, unknown, or of another version; another
    dtype, shape, NaN, inf; theta_d = 0 where c = 0; a configuration that says otherwise than the header; a tensor to
    which the configuration does not entitle the file.
    """
    folder = Path(folder)
    _check_folder(folder)
    fields = _fields(folder / CONFIG)
    header, tensors = _weights(folder)
    if header is None:
        return _read_without_header(folder, fields, tensors)
    _check_agreement(fields, header, folder)
    return _saved(_config(_merged(fields, header), folder, header), header, tensors, folder)


def write(folder: str | Path, tensors: Mapping[str, Tensor], header: Header, config: UniProjConfig) -> None:
    """Write both files of an adapter, or none: a crash or a full disk leaves those of before.

    tensors: `base_model.uniproj_theta_d` (d,), `base_model.uniproj_projections.*` of a learned P, and heads by PEFT's
    names; the identity that ties them to `header` is added. Raises AdapterError for what `read` would refuse, and
    where the disk refuses.
    """
    check(folder, tensors, header, config)
    weights = stored.serialise({**tensors, stored.IDENTITY: identity.encode(header)}, header.to_metadata())
    replace({Path(folder) / WEIGHTS: weights, Path(folder) / CONFIG: _config_text(header, config)})


def check(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    header: Header,
    config: UniProjConfig,
    has_offset: bool | None = None,
) -> None:
    """Raises AdapterError for tensors that are not written, as they could not be read.

    has_offset: whether P has a c, where that is known; else what its class says.
    """
    try:
        shapes = stored.shapes_without_P(tensors, header.projection, header.d)
        stored.check_shapes(tensors, shapes, header.projection)
        stored.check_numbers(tensors, header.projection, has_offset)
        _beside_P(tensors, config, header, "the adapter")
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
    return _saved(config_of(header, folder), header, tensors, folder)


def restore(folder: str | Path) -> SavedAdapter:
    """Write `adapter_config.json` anew, as the header of the weights has it.

    For a configuration that was edited or lost, or is still the old one because a crash fell between the two renames.
    Raises AdapterError as `of_weights` does.
    """
    saved = of_weights(folder)
    assert saved.header is not None
    replace({Path(folder) / CONFIG: _config_text(saved.header, saved.config)})
    return saved


def config_of(header: Header, where: str | Path) -> UniProjConfig:
    """The configuration that a header describes, for an adapter that has no configuration file yet."""
    base = {"base_model_name_or_path": header.base_model, "revision": header.base_revision}
    return _config(_merged(base, header), Path(where), header)


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
    """The error of who would write a file that can run code, or write beside one."""
    return AdapterError(
        f"{folder}: must not hold {UNSAFE}, which uniproj never opens, as that can run code. "
        "Remove it and save with safe_serialization=True."
    )


def refuse_unsafe(folder: Path) -> None:
    """Raises AdapterError for a folder with a file of weights that can run code."""
    if exists(folder / UNSAFE):
        raise unsafe(folder)


def is_ours(folder: Path) -> bool:
    """Whether the weights in a folder begin as those of a uniproj adapter do."""
    try:
        with opened(folder / WEIGHTS) as file:
            return PREFIX.encode() in file.read(_FIRST_BYTES)
    except AdapterError:
        return False


def says_ours(folder: Path) -> bool:
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
    with stored.weights(folder / WEIGHTS) as file:
        header = Header.from_metadata(file.metadata, where)
        if header is not None:
            # all that tells how large the numbers are, before one of them is read
            header.check_version(where)
            index = stored.renamed(file.index)
            stored.check_shapes(index, header.shapes(index, where), header.projection)
            _beside_P(index, config_of(header, folder), header, where)
        written = file.read()
    tensors = stored.renamed(written)
    if header is not None:
        stored.check_digest(written, file.metadata, where)
        _check_identity(tensors.pop(stored.IDENTITY, None), header, where)
        stored.check_numbers(tensors, header.projection)
    return header, tensors


def _saved(config: UniProjConfig, header: Header | None, tensors: dict[str, Tensor], folder: Path) -> SavedAdapter:
    of_P = {name: tensor for name, tensor in tensors.items() if name.startswith(stored.OWN)}
    return SavedAdapter(config, header, {**of_P, **_beside_P(tensors, config, header, str(folder / WEIGHTS))})


def _beside_P(
    tensors: Mapping[str, Tensor], config: UniProjConfig, header: Header | None, where: str
) -> dict[str, Tensor]:
    """What `heads.entitled` lets through; a file from before the header does not list the adapted modules."""
    beside = {name: tensor for name, tensor in tensors.items() if not name.startswith(stored.OWN)}
    modules = None if header is None else new_names(header.layout, config.remap or []).values()
    return entitled(beside, config, modules, where)


def _check_identity(found: Tensor | None, header: Header, where: str) -> None:
    if found is None and header.format_version >= _FIRST_WITH_IDENTITY:
        raise AdapterError(f"{where}: must hold the tensor {stored.IDENTITY}, got none. Copy or download it again.")
    if found is not None and (differs := identity.difference(found, header)):
        raise AdapterError(f"{where}: the header must be that of the numbers: {differs}. Take the original.")


def _config_text(header: Header, config: UniProjConfig) -> bytes:
    noted = {**config.to_dict(), **_of_P(header)}
    if noted.get("base_model_name_or_path") is None:
        noted["base_model_name_or_path"] = header.base_model
    return config_text(noted).encode()


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
        remedy = _RESTORE.format(folder) if missing == [CONFIG] and is_ours(folder) else "Check the path"
        raise AdapterError(f"{folder}: must hold {CONFIG} and {WEIGHTS}, got no {missing[0]}. {remedy}.")


def _fields(path: Path) -> dict[str, Any]:
    fields = read_json(path)
    kind = fields.get("peft_type") if isinstance(fields, dict) else None
    if kind != KIND:
        raise AdapterError(f"{path}: peft_type must be {KIND}, got {kind!r}. It is an adapter of another method.")
    schema.check(schema.Configuration, fields, f"{path}: ")
    return fields


def _of_P(header: Header) -> dict[str, Any]:
    """What a configuration says of P, as the header has it; d may also be left out there."""
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
    """The configuration that the header describes; the file beside it adds where the base lies, and no more."""
    free = {key: fields[key] for key in FREE if key in fields}
    return {**header.settings, **_of_P(header), "d": header.d, "peft_type": KIND, **free}


def _read_without_header(folder: Path, fields: dict[str, Any], tensors: dict[str, Tensor]) -> SavedAdapter:
    if fields.get("format_version") is not None:
        raise AdapterError(
            f"{folder / WEIGHTS}: must hold a header in its metadata, as {CONFIG} says (format "
            f"{fields['format_version']}), got none. Another tool rewrote the file: take the original."
        )
    config = _config(fields, folder, None)
    theta_d = tensors.get(stored.THETA_D)
    size = config.d if config.d is not None else 0 if theta_d is None else theta_d.numel()
    stored.check_shapes(tensors, stored.shapes_without_P(tensors, config.projection, size), config.projection)
    stored.check_numbers(tensors, config.projection)
    return _saved(config, None, tensors, folder)


def _config(fields: dict[str, Any], folder: Path, header: Header | None) -> UniProjConfig:
    from uniproj.tuner.config import UniProjConfig  # which imports this file, to validate what it loads

    try:
        config: UniProjConfig = UniProjConfig.from_peft_type(**UniProjConfig.check_kwargs(**fields))
    except (AdapterError, ProjectionError) as error:
        raise AdapterError(f"{folder / CONFIG}: {error}") from error
    except Exception as error:  # whatever PEFT makes of a field of another type
        raise AdapterError(f"{folder / CONFIG}: must be a configuration of {KIND}, got {error}. Restore it.") from error
    config.header = header
    return config
