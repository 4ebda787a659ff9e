"""A small UNet of diffusers takes the exported LoRA, by PEFT and by diffusers' own loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from tests.exchange.tools import SAME, difference, fields_of
from uniproj.exchange import export
from uniproj.tuner import UniProjConfig, adapter_of

diffusers = pytest.importorskip("diffusers")
PREFIX = "base_model.model"


def _unet() -> Any:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        **blocks,
    ).eval()


@torch.no_grad()
def _noise(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sample, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 12, generator=generator)
    return model(sample, 10, text).sample


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rank", [None, 8])
def test_a_unet_takes_it(rank: int | None, tmp_path: Path) -> None:
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model = get_peft_model(_unet(), UniProjConfig(d=200, r=4, lora_alpha=8, target_modules=targets)).eval()
    with torch.no_grad():
        adapter_of(model).theta_d.mul_(100.0)
    wanted = _noise(model)
    assert difference(wanted, _noise(_unet())) > 1e3 * SAME
    export(model, tmp_path, rank=rank)
    assert difference(_noise(PeftModel.from_pretrained(_unet(), str(tmp_path))), wanted) <= SAME

    # diffusers' own loader opens no adapter_config.json
    unet, found = _unet(), fields_of(tmp_path)
    settings = {f"{PREFIX}.{key}": found[key] for key in ("r", "lora_alpha", "target_modules")}
    unet.load_lora_adapter(load_file(tmp_path / "adapter_model.safetensors"), prefix=PREFIX, metadata=settings)
    assert difference(_noise(unet), wanted) <= SAME
