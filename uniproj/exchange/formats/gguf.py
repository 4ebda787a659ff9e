"""LoRA for llama.cpp and Ollama: one GGUF file, and a Modelfile beside it.

Source: llama.cpp, `src/llama-adapter.cpp` and `llama-adapter.h` (reading), `convert_lora_to_gguf.py` and `conversion/`
(names, order of rows); Ollama, `docs/modelfile` (`FROM`, `ADAPTER`). A pair NAME.lora_b (out, r), NAME.lora_a (r, in)
adds alpha / r B A to the tensor NAME of the base model, with r of that pair and one alpha for all. RoPE turns pairs of
coordinates of q and k: in Transformers i and i + half of a head, in llama.cpp these or, for the architectures of
`_INTERLEAVED`, 2 i and 2 i + 1, for which a base model's rows were brought into that order, so B's are.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from uniproj.errors import AdapterError, printable
from uniproj.exchange import bases
from uniproj.exchange.adapter import Adapter
from uniproj.exchange.formats._peft import refuse_all_but_linear
from uniproj.exchange.registry import Format, register
from uniproj.format.disk import exists, replace
from uniproj.layout import Site

# Transformers' model_type and gguf's architecture; only those that llama.cpp was run with (tests/engines)
_INTERLEAVED = {"granite": "GRANITE", "llama": "LLAMA", "mistral": "LLAMA", "smollm3": "SMOLLM3"}
_IN_HALVES = {
    "gemma": "GEMMA",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    "olmo2": "OLMO2",
    "phi3": "PHI3",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
}
ARCHITECTURES = _INTERLEAVED | _IN_HALVES
# what the configuration calls the number of heads in the rows of a tensor
_HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


@register("gguf")
class GGUFFormat(Format):
    """Written, in `dtype`."""

    suffix = ".gguf"
    dtype = torch.float32

    def write(self, adapter: Adapter, path: Path, rank: int | None) -> None:
        """A file, and a Modelfile of the same name; every module has its own rank.

        alpha is the first module's; what differs in another's is in its B, which is rounded once. Raises AdapterError
        for what is trained besides A and B, for layers that are not linear, for a base model whose configuration or
        conversion is not known, for modules that GGUF has no tensor for, and for a factor that `dtype` cannot hold.
        """
        refuse_all_but_linear(adapter, "GGUF")
        base = adapter.base or _named(adapter)
        tensors = _tensors(adapter, base)
        content = self._content(adapter, base, tensors)
        replace({path: content, path.with_suffix(".Modelfile"): _modelfile(base, path).encode()})

    @torch.no_grad()
    def _content(self, adapter: Adapter, base: PretrainedConfig, tensors: Mapping[str, str]) -> Iterator[bytes]:
        lora, dtype = adapter.lora(), np.dtype(str(self.dtype).removeprefix("torch."))
        sites = lora.layout.sites
        products = {site.name: lora.scales[site.name] * site.r for site in sites}
        alpha = float(np.float32(products[sites[0].name]))  # as the file has it
        writer = _header(base, alpha)
        for site in sites:
            for factor, shape in (("b", (site.out_features, site.r)), ("a", (site.r, site.in_features))):
                name = f"{tensors[site.name]}.lora_{factor}"
                writer.add_tensor_info(name, shape, dtype, dtype.itemsize * math.prod(shape))
        yield _packed(writer)
        for slot, numbers in enumerate(lora.layout.split_sites(lora.theta_D)):
            site, is_A = sites[slot // 2], bool(slot % 2)
            if not is_A:
                numbers = _in_order(numbers.double() * (products[site.name] / alpha), site, tensors[site.name], base)
            # below, all of a factor would lose bits, or be 0
            least, most = torch.finfo(self.dtype).tiny, torch.finfo(self.dtype).max
            if (largest := float(numbers.abs().max())) and not least <= largest <= most:
                raise AdapterError(
                    f"export: the largest number of {site.name} must lie in [{least:.3g}, {most:.6g}], where {dtype} "
                    f"has all its bits, got {largest:.3g}. Export to {'gguf' if dtype.itemsize == 2 else 'lora'}."
                )
            data = numbers.to(self.dtype).contiguous().numpy().tobytes()
            yield data + bytes(-len(data) % writer.data_alignment)


def _named(adapter: Adapter) -> PretrainedConfig:
    """The configuration of the base model that the adapter's own names."""
    if not (name := adapter.config.base_model_name_or_path):
        raise AdapterError(
            "export: what GGUF calls a module the base model's configuration tells, got none. Pass --base."
        )
    try:
        return bases.configuration(name)
    except AdapterError as error:
        raise AdapterError(f"export: {error} Or pass --base.") from error


def _architecture(base: PretrainedConfig) -> Any:
    """Of `gguf.MODEL_ARCH`."""
    named = _gguf().MODEL_ARCH.__members__
    known = {kind: named[name] for kind, name in ARCHITECTURES.items() if name in named}
    if base.model_type not in known:
        raise AdapterError(
            f"export: the base model must be of a type whose conversion is known, {', '.join(sorted(known))}, got "
            f"{base.model_type}. Export to lora, which llama.cpp's convert_lora_to_gguf.py may convert."
        )
    return known[base.model_type]


def _tensors(adapter: Adapter, base: PretrainedConfig) -> dict[str, str]:
    """{site: the tensor of the base model that it changes}."""
    known = _gguf().get_tensor_name_map(_architecture(base), base.num_hidden_layers)
    names = {site.name: known.get_name(site.name) for site in adapter.layout.sites}
    for site, name in names.items():
        if name is None or (name == "output" and base.tie_word_embeddings):
            why = "is tied to the input embedding, as GGUF has one for both" if name else "it has no tensor for"
            raise AdapterError(
                f"export: GGUF must have a tensor of its own for every module, got {site}, which {why}. Leave it out "
                "of target_modules."
            )
    return {site: f"{name}.weight" for site, name in names.items()}


def _in_order(B: Tensor, site: Site, tensor: str, base: PretrainedConfig) -> Tensor:
    """B (out, r) with the rows in the order of GGUF's tensor."""
    part = tensor.split(".")[-2]
    if base.model_type not in _INTERLEAVED or part not in _HEADS:
        return B
    heads = getattr(base, _HEADS[part])
    size = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
    if len(B) != heads * size:
        raise AdapterError(
            f"export: {site.name} must have a row for each of {heads} heads of {size}, as the base model has them, got "
            f"{len(B)}. Pass the adapter's own base."
        )
    return B.unflatten(0, (heads, 2, size // 2)).transpose(1, 2).flatten(0, 2)


def _header(base: PretrainedConfig, alpha: float) -> Any:
    """gguf's writer of a file."""
    gguf = _gguf()
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[_architecture(base)])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    return writer


def _packed(writer: Any) -> bytes:
    """All that comes before the numbers."""
    stream = io.BytesIO()
    writer.fout, writer.state = [stream], type(writer.state).EMPTY  # a file that was opened
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(stream, stream.tell())
    return stream.getvalue()


def _modelfile(base: PretrainedConfig, path: Path) -> str:
    name = str(base.name_or_path) or "base.gguf"
    return (
        "# FROM is the base model as Ollama has it: a name, a GGUF file, or a folder of safetensors\n"
        f"FROM {printable(Path(name).resolve() if exists(Path(name)) else name)}\n"
        f"ADAPTER ./{printable(path.name)}\n"
    )


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise AdapterError(
            f"export: GGUF needs the package gguf, got {error}. Run pip install 'uniproj[gguf]'."
        ) from error
    return gguf
