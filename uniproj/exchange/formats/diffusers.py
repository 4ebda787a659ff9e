"""LoRA as diffusers loads it.

Source: diffusers 0.42.1, `diffusers.loaders.peft` (`load_lora_adapter`), `diffusers.loaders.lora_pipeline`
(`load_lora_weights`) and `diffusers.utils.peft_utils` (`get_peft_kwargs`). One file holds A (r, in) and B (out, r) of
every module by its name, after that of the pipeline's part: `unet` or `transformer`. Ranks are those of the tensors,
and without an alpha in the file the update is B A.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import torch

from uniproj.exchange.adapter import Adapter
from uniproj.exchange.formats._peft import refuse_all_but_linear
from uniproj.exchange.registry import Format, register
from uniproj.format.disk import replace
from uniproj.format.tensors import streamed

WEIGHTS = "pytorch_lora_weights.safetensors"
# what every UNet of diffusers is made of, and no transformer
_UNET = ("down_blocks.", "mid_block.", "up_blocks.")


@register("diffusers")
class DiffusersFormat(Format):
    """Written in float32."""

    weights = WEIGHTS

    def write(self, adapter: Adapter, folder: Path, rank: int | None) -> None:
        """A folder with the one file that `load_lora_weights` of a pipeline takes, every module padded to the largest
        rank, with s in B, which is rounded once.

        Raises AdapterError for anything that is trained besides A and B of linear layers, for replicated layers, for an
        aLoRA, and where the disk refuses; what was there before stays.
        """
        refuse_all_but_linear(adapter, "diffusers")
        lora = adapter.lora()
        sites = lora.layout.sites
        r = max(site.r for site in sites)
        part = "unet" if any(site.name.startswith(_UNET) for site in sites) else "transformer"
        index = {}
        for site in sites:
            index[f"{part}.{site.name}.lora_B.weight"] = (torch.float32, (site.out_features, r))
            index[f"{part}.{site.name}.lora_A.weight"] = (torch.float32, (r, site.in_features))
        replace({folder / WEIGHTS: streamed(index, chain.from_iterable(lora.padded(r, 1.0)))})
