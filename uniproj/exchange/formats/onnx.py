"""LoRA as ONNX Runtime takes it: one file of tensors, which are inputs of a model.

Source: ONNX Runtime GenAI 0.18, `onnxruntime_genai.models.builders.base` (`make_matmul_lora`), whose model builder
calls the factors of `model.layers.0.self_attn.q_proj` `model.layers.0.attn.q_proj.lora_A.MatMul.weight`, (in, r), and
`.lora_B.MatMul.weight`, (r, out), with s in B; ONNX Runtime 1.32, whose `AdapterFormat` writes the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from uniproj.errors import AdapterError
from uniproj.exchange.adapter import Adapter
from uniproj.exchange.formats._peft import refuse_all_but_linear
from uniproj.exchange.registry import Format, register
from uniproj.format.disk import replace
from uniproj.format.tensors import check_finite

_KNOWN = re.compile(r"(model\.layers\.\d+\.)(?:self_(attn\.[qkvo]_proj)|(mlp\.(?:gate|up|down)_proj))")


@register("onnx")
class ONNXFormat(Format):
    """Written, in float32."""

    suffix = ".onnx_adapter"

    @torch.no_grad()
    def write(self, adapter: Adapter, path: Path, rank: int | None) -> None:
        """A file, every module at its own rank; s is multiplied into B, which is rounded once.

        Raises AdapterError for a head, a bias, added tokens or anything else that is trained besides A and B of linear
        layers, for replicated layers, for an aLoRA, for modules whose name in a model is not known, without
        onnxruntime, for numbers beyond float32, and where the disk refuses; what was there before stays.
        """
        refuse_all_but_linear(adapter, "ONNX Runtime")
        names = {site.name: _name(site.name) for site in adapter.layout.sites}
        found, tensors = adapter.lora(), {}
        for slot, factor in enumerate(found.layout.split_sites(found.theta_D)):
            site, is_A = found.layout.sites[slot // 2], bool(slot % 2)
            written = (factor if is_A else factor.double() * found.scales[site.name]).float().T.contiguous()
            check_finite(written, site.name)
            tensors[f"{names[site.name]}.lora_{'BA'[is_A]}.MatMul.weight"] = written
        replace({path: _content(tensors)})


def _name(site: str) -> str:
    """What the model builder calls a linear layer."""
    if not (match := _KNOWN.fullmatch(site)):
        raise AdapterError(
            "export: modules for ONNX Runtime must be called model.layers.N.self_attn.q_proj (k, v, o) or "
            f"model.layers.N.mlp.gate_proj (up, down), whose names in its models are known, got {site}. Export to "
            "lora, of which its model builder makes a model."
        )
    return match[1] + (match[2] or match[3])


def _content(tensors: Mapping[str, Tensor]) -> bytes:
    """What ONNX Runtime writes, to a file alone."""
    try:
        from onnxruntime import AdapterFormat, OrtValue
    except ImportError as error:
        raise AdapterError(
            f"export: ONNX Runtime needs the package onnxruntime, got {error}. Run pip install 'uniproj[onnx]'."
        ) from error
    adapter = AdapterFormat()
    # it keeps none of the tensors alive, so these live until the file is written
    adapter.set_parameters({name: OrtValue.ortvalue_from_numpy(tensor.numpy()) for name, tensor in tensors.items()})
    try:
        with TemporaryDirectory() as folder:
            path = Path(folder, "adapter")
            adapter.export_adapter(str(path))
            return path.read_bytes()
    except (OSError, RuntimeError) as error:
        raise AdapterError(
            f"export: the folder of temporary files must have space for one, got {error}. Free some, or set TMPDIR."
        ) from error
