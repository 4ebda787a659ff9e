"""`python -m uniproj inspect PATH`: everything that the file of an adapter says, without a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from uniproj.format.file import CONFIG, WEIGHTS, SavedAdapter, read
from uniproj.format.header import PREFIX, Header
from uniproj.registry import get


def describe(folder: Path) -> dict[str, Any]:
    """What is known of a saved adapter, as JSON holds it. Raises AdapterError for a file that is not as saved."""
    saved = read(folder)
    return {
        "path": str(folder),
        "bytes": {name: (folder / name).stat().st_size for name in (CONFIG, WEIGHTS)},
        "bytes_of_tensors": sum(tensor.numel() * tensor.element_size() for tensor in saved.tensors.values()),
        "tensors": {
            name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
            for name, tensor in saved.tensors.items()
        },
        **(_of_config(saved) if saved.header is None else _of_header(saved.header)),
        "config": saved.config,
    }


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """What `describe` found, each fact short enough for one line; of the modules the first and the last."""
    shown = {k: v for k, v in found.items() if k not in ("modules", "config", "settings", "tensors", "bytes")}
    shown["tensors"] = ", ".join(f"{name} {t['dtype']} {t['shape']}" for name, t in found["tensors"].items())
    shown["bytes"] = ", ".join(f"{name} {size:,}" for name, size in found["bytes"].items())
    if modules := found.get("modules"):
        rows = [_row(*row) for row in (modules[0], modules[-1])]
        shown["modules"] = f"{len(modules)}: {rows[0]} .. {rows[1]}"
    settings = found.get("settings") or found["config"]
    shown["settings"] = ", ".join(f"{k}={v}" for k, v in settings.items() if v not in (None, {}, False))
    return shown


def _row(name: str, out: int, in_: int, r: int, *more: int | list[int]) -> str:
    of_stack = "".join(f", {'axes' if isinstance(value, list) else 'count'} {value}" for value in more)
    return f"{name} (out {out}, in {in_}, r {r}{of_stack})"


def _of_header(header: Header) -> dict[str, Any]:
    plain = {f.name: getattr(header, f.name) for f in dataclasses.fields(header) if f.name != "layout"}
    return {
        **plain,
        "theta_D": get(header.projection).formula,
        "D": header.layout.D,
        "layout_fingerprint": header.layout.fingerprint,
        "modules": [site.row for site in header.layout.sites],
    }


def _of_config(saved: SavedAdapter) -> dict[str, Any]:
    config = saved.config
    return {
        "format_version": f"none ({PREFIX[:-1]} wrote no header then)",
        **{
            key: config.get(key) for key in ("projection", "projection_kwargs", "projection_seed", "layout_fingerprint")
        },
        "d": saved.theta_d.numel(),
        "theta_D": get(config["projection"]).formula,
        "checksum": config.get("projection_checksum"),
        "base_model": config.get("base_model_name_or_path"),
    }
