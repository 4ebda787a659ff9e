"""`export` to other formats, and `import_adapter` from them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from uniproj.errors import AdapterError
from uniproj.exchange import peft_folder, registry
from uniproj.exchange.adapter import Adapter, LoRAAdapter
from uniproj.exchange.compress import IDENTITY, compress
from uniproj.exchange.formats._peft import PeftMethod
from uniproj.format import file
from uniproj.format.disk import exists

_FILES = (file.CONFIG, file.WEIGHTS)


def export(
    source: str | Path | PeftModel,
    out: str | Path,
    to: str = "lora",
    rank: int | None = None,
    base: str | nn.Module | None = None,
    adapter_name: str = "default",
    trust_remote_code: bool = False,
) -> None:
    """Write a uniproj adapter (a folder, or the one of a live model) in another format, with the same updates.

    to: a name of `registry.names()`: "lora", exact in float32, at the ranks of the adapter or padded to `rank`; "vllm",
    LoRA under vLLM's rules, padded to a rank that vLLM knows; "gguf", "gguf_f16", "openvino", "onnx", .. for the
    engines of docs/export.md; "unilora", "vera", "vblora", "tinylora" for adapters of that projection. base: the base
    model or its name, where P is made of its weights, for "tinylora", and for GGUF where the adapter's own
    configuration does not name it; trust_remote_code: whether Python code that comes with a model of this name may run.
    out: a folder, or a file that ends in .gguf or .onnx_adapter.

    Raises AdapterError for anything that the format cannot say; what lay in `out` then stays as it was.
    """
    _refuse_in_place(source, out)
    written = registry.get(to)
    if rank is not None and not written.takes_rank:
        raise AdapterError(
            f"export: rank must be left out for {to}, which has the adapter's, got {rank}. Export to lora."
        )
    if written.suffix not in ("", Path(out).suffix):
        raise AdapterError(
            f"export: {to} is one file and must have a name that ends in {written.suffix}, got {out}. Rename it."
        )
    if isinstance(source, PeftModel):
        adapter = Adapter.of_model(source, adapter_name)
    elif isinstance(source, str | Path):
        adapter = Adapter.of_file(source, base, trust_remote_code)
    else:
        raise AdapterError(
            f"export: the source must be a PeftModel or the folder of an adapter, got {type(source).__name__}. "
            "Pass the PeftModel itself, not what wraps it."
        )
    written.write(adapter, Path(out), rank)


def import_adapter(
    path: str | Path,
    out: str | Path,
    projection: str | None = None,
    d: int | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    base: str | nn.Module | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write an adapter of another format as a uniproj adapter; returns what it is.

    Formats are those of `registry.names()`, such as PEFT's LORA, UNILORA, VERA, VBLORA and TINYLORA.
    Without `projection` the updates stay the same: P is PEFT's own where its seed makes it again, else the identity
    (`lora`, D numbers). With it they are the nearest that this projection has at `d`; the energy that is lost is among
    what is returned. base: the base model or its name, for all but LORA, and for projections made of its weights;
    trust_remote_code: whether Python code that comes with a model of this name may run.

    Raises AdapterError or ProjectionError; what lay in `out` then stays as it was.
    """
    path = Path(path)
    _refuse_in_place(path, out)
    found = _reader(path).read(path, base, trust_remote_code)
    if isinstance(found, LoRAAdapter) or projection is not None:
        lora = found if isinstance(found, LoRAAdapter) else found.lora()
        adapter, report = compress(lora, projection or IDENTITY, d, seed, options or {}, base, trust_remote_code)
        report["lost_energy"] = 1.0 - report["captured_delta_W"]
    elif d is not None or seed or options:
        raise AdapterError(
            "import: d, seed and options are those of a projection to compress into, got no projection. Name one, or "
            "leave them out."
        )
    else:
        adapter, P = found, found.projection
        report = {"projection": P.name, "D": P.D, "d": P.d, "trained": P.trained, "lost_energy": 0.0}
    before = size(path)
    adapter.save(out)
    return {**report, "bytes_before": before, "bytes": size(out)}


def size(out: str | Path, weights: str = registry.Format.weights) -> int:
    """Bytes of the numbers of an adapter: of a file, or of a folder's files whose names match `Format.weights`."""
    path = Path(out)
    files = [path] if path.is_file() else path.glob(weights)
    return sum(file.stat().st_size for file in files if file.exists())


def _reader(folder: Path) -> registry.Format:
    formats = list(registry.every())
    if found := next((known for known in formats if known.reads(folder)), None):
        return found
    kinds = " or ".join(known.kind for known in formats if isinstance(known, PeftMethod))
    raise AdapterError(
        f"{folder}: must hold an adapter of PEFT type {kinds}, got {peft_folder.peft_type(folder)}. Take another."
    )


def _refuse_in_place(source: object, out: str | Path) -> None:
    """Raises AdapterError if `out` is the folder that is read, by whatever path, or shares a file with it."""
    if not isinstance(source, str | Path) or not exists(Path(source)):
        return
    # folders on the way to `out` may not exist yet, so no `..` may stay in it
    read, write = Path(source), Path(os.path.realpath(out))
    places = [(read, write), *((read / name, write / other) for name, other in product(_FILES, repeat=2))]
    if any(exists(one) and exists(other) and one.samefile(other) for one, other in places):
        raise AdapterError(
            f"{out}: must be another folder than the one that is read, whose numbers would be lost, got {source} "
            "itself, or links to its files. Choose a new folder."
        )
