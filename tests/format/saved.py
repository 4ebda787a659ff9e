"""Small saved adapters, made without a model, and ways to damage them."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from uniproj import LoRALayout, build, get
from uniproj.format import file
from uniproj.format.header import Header
from uniproj.format.keys import OF_P, THETA_D
from uniproj.format.tensors import DIGEST, open_weights, serialise
from uniproj.tuner import UniProjConfig

LAYOUT = LoRALayout.from_shapes({f"layers.{i}.{m}": (24, 16) for i in (2, 10) for m in ("q", "v")}, r=3)
HEAD = "base_model.model.head.weight"


def save(folder: Path, projection: str = "unilora", **fields: Any) -> file.SavedAdapter:
    """Write an adapter of LAYOUT with a head, and give back what was written."""
    size = {"d": 40} if get(projection).free_d else {}
    P = build(projection, layout=LAYOUT, seed=7, **size)
    config = UniProjConfig(
        projection=projection,
        projection_seed=7,
        r=3,
        target_modules=["q", "v"],
        modules_to_save=["head"],
        **size,
        **fields,
    )
    header = Header.of(config.to_dict(), P)
    head = torch.linspace(-1, 1, 6).view(2, 3)
    own = {f"{OF_P}{name}": p.detach() for name, p in P.named_parameters()}
    tensors = {THETA_D: P.init_theta(1), HEAD: head, **own}
    file.write(folder, tensors, header, config.to_dict())
    return file.SavedAdapter(config.to_dict(), header, tensors)


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, tensors) of a safetensors file, read by the format's own words: length, JSON, bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, tensors: bytes) -> bytes:
    """The inverse of `parts`."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tensors


def packed_by_zlib(text: str) -> str:
    """A line of a header as format 1 packed it."""
    return base64.b64encode(zlib.compress(text.encode())).decode()


def edit_weights(folder: Path, change: Callable[[dict[str, Any], bytes], tuple[Any, bytes]]) -> None:
    """Change the file of weights behind uniproj's back."""
    path = folder / file.WEIGHTS
    path.write_bytes(joined(*change(*parts(path.read_bytes()))))


def drop_header(folder: Path) -> None:
    """As a tool does that keeps tensors alone, and as files had none before format 1."""
    edit_weights(folder, lambda header, tensors: ({k: v for k, v in header.items() if k != "__metadata__"}, tensors))


def _same(given: dict[str, Any]) -> dict[str, Any]:
    return given


def rewrite(
    folder: Path,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = _same,
    lines: Callable[[dict[str, str]], dict[str, str]] = _same,
) -> None:
    """Save other tensors, or under another header, with their own digest: a consistent file of bad numbers."""
    path = folder / file.WEIGHTS
    with open_weights(path) as saved:
        tensors, metadata = saved.read(), saved.metadata
    del metadata[DIGEST]
    path.write_bytes(serialise(change(tensors), lines(metadata)))


def relabel(folder: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    """Save the same tensors under another header, with its own digest."""
    rewrite(folder, lines=change)


def reconfigure(folder: Path, **changes: Any) -> None:
    """Change adapter_config.json."""
    path = folder / file.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
