"""LoRA as mlx-lm reads it.

Source: mlx-lm 0.32.2, `mlx_lm.tuner.utils` (`load_adapters`, `linear_to_lora_layers`) and `mlx_lm.tuner.lora`. A layer
adds scale (x lora_a) lora_b with lora_a (in, r) and lora_b (r, out), at one rank and one scale for all. `keys` name the
modules that have these, in the whole model or in each of its last `num_layers` layers; where all are names in the whole
model, as here, `num_layers` decides nothing. mlx-lm takes no other tensor, and none of another shape. Its modules and
their weights are those of Transformers where the layers are called `model.layers.N`; others it renames. Only of
Falcon-H1 (`mlx_lm.models.falcon_h1`, `sanitize`) are the weights others.
"""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path

import torch

from uniproj.errors import AdapterError
from uniproj.exchange.adapter import Adapter
from uniproj.exchange.formats._peft import refuse_all_but_linear
from uniproj.exchange.registry import Format, register
from uniproj.format.disk import replace
from uniproj.format.file import CONFIG, config_text
from uniproj.format.tensors import streamed

WEIGHTS = "adapters.safetensors"
_SAME_NAME = re.compile(r"model\.layers\.\d+\..+|lm_head")


@register("mlx")
class MLXFormat(Format):
    """Written in float32."""

    weights = WEIGHTS

    def write(self, adapter: Adapter, folder: Path, rank: int | None) -> None:
        """A folder of mlx-lm, every module padded to the largest rank; where modules differ in s, it is multiplied
        into B, which is rounded once.

        Raises AdapterError for a head, a bias, added tokens or anything else that is trained besides A and B of linear
        layers, for replicated layers, for an aLoRA, for modules that mlx-lm calls otherwise, for a Falcon-H1 if the
        base model is known, and where the disk refuses; what was there before stays.
        """
        refuse_all_but_linear(adapter, "MLX")
        if adapter.base is not None and adapter.base.model_type == "falcon_h1":
            raise AdapterError(
                "export: mlx-lm must have the base model's weights as Transformers has them, got a Falcon-H1, whose "
                "multipliers it multiplies into them. Export to lora and merge it into the base model, which mlx-lm "
                "converts."
            )
        lora = adapter.lora()
        sites = lora.layout.sites
        if other := [site.name for site in sites if not _SAME_NAME.fullmatch(site.name)]:
            raise AdapterError(
                "export: modules for MLX must be called model.layers.N.NAME, or lm_head, as mlx-lm calls those of "
                f"other models otherwise than Transformers, got {other[0]}. Export to lora and merge it into the base "
                "model, which mlx-lm converts."
            )
        r = max(site.r for site in sites)
        scales = {*lora.scales.values()}
        scale = scales.pop() if len(scales) == 1 else 1.0
        index = {}
        for site in sites:
            index[f"{site.name}.lora_b"] = (torch.float32, (r, site.out_features))
            index[f"{site.name}.lora_a"] = (torch.float32, (site.in_features, r))
        tensors = (factor.T for factor in chain.from_iterable(lora.padded(r, scale)))
        parameters = {"rank": r, "scale": scale, "dropout": 0.0, "keys": [site.name for site in sites]}
        config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}
        replace({folder / WEIGHTS: streamed(index, tensors), folder / CONFIG: config_text(config).encode()})
