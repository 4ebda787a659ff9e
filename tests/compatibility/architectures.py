"""Small models of the architectures that people adapt, and what is adapted of each.

Run as `python -m tests.compatibility.architectures FOLDER` it trains an adapter on every one of them, for another
process to load.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from tests.tuner.models import VOCABULARY, make
from uniproj.tuner import UniProjConfig, adapter_of

_GENERATOR = torch.Generator().manual_seed(1)
_IDS = torch.randint(3, 60, (3, 9), generator=_GENERATOR)  # the rest are special tokens
_IMAGES = torch.randn(3, 3, 16, 16, generator=_GENERATOR)
_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_IDS_OF = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TEXT: dict[str, Any] = {**_SMALL, **_IDS_OF, "vocab_size": VOCABULARY, "tie_word_embeddings": False}
_GROUPED: dict[str, Any] = {**_TEXT, "num_key_value_heads": 1, "head_dim": 8}
_VISION: dict[str, Any] = {**_SMALL, "image_size": 16, "patch_size": 8}
_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@dataclass(frozen=True)
class Architecture:
    """base: makes the model, the same weights on every call; inputs: a batch for it; modules and parameters: what is
    adapted of it."""

    base: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    modules: list[str] | str
    parameters: list[str] = field(default_factory=list)

    def output(self, model: nn.Module) -> Tensor:
        """Logits, or an image."""
        found = model(**self.inputs)
        return found if isinstance(found, Tensor) else found[0]

    def adapted(self) -> Any:
        """In eval mode, so that a batch normalisation keeps its averages and nothing is dropped."""
        return get_peft_model(self.base(), UniProjConfig(d=60, **self.lora())).eval()  # type: ignore[arg-type]

    def lora(self) -> dict[str, Any]:
        """Fields that PEFT's LORA has too."""
        return {"r": 4, "target_modules": self.modules, "target_parameters": self.parameters}


def _of(name: str, config: str, **fields: Any) -> Callable[[], nn.Module]:
    return lambda: make(getattr(tf, name), getattr(tf, config)(**fields))


class _Resnet(nn.Module):
    def __init__(self, before: int, after: int, time: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, before), nn.GroupNorm(2, after)
        self.conv1, self.conv2 = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
        self.time_emb_proj, self.conv_shortcut = nn.Linear(time, after), nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x))) + self.time_emb_proj(time)[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(functional.silu(self.norm2(h)))


class _CrossAttention(nn.Module):
    def __init__(self, n: int, context: int):
        super().__init__()
        self.to_q, self.to_out = nn.Linear(n, n, bias=False), nn.ModuleList([nn.Linear(n, n)])
        self.to_k, self.to_v = nn.Linear(context, n, bias=False), nn.Linear(context, n, bias=False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.to_q(x.flatten(2).mT), self.to_k(context), self.to_v(context)
        found = self.to_out[0](functional.scaled_dot_product_attention(q, k, v))
        return x + found.mT.unflatten(2, x.shape[2:])


class _UNet(nn.Module):
    """One step down and one up, each of a ResNet block and an attention to the text, as in Stable Diffusion."""

    def __init__(self, n: int):
        super().__init__()
        self.time_embedding, self.conv_in = nn.Linear(1, n), nn.Conv2d(3, n, 3, padding=1)
        self.down, self.attentions = _Resnet(n, n, n), nn.ModuleList([_CrossAttention(m, 16) for m in (2 * n, n)])
        self.downsample, self.mid = nn.Conv2d(n, n, 3, stride=2, padding=1), _Resnet(n, 2 * n, n)
        self.upsample, self.up = nn.ConvTranspose2d(2 * n, n, 2, stride=2), _Resnet(2 * n, n, n)
        self.conv_out = nn.Conv2d(n, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        time = functional.silu(self.time_embedding(timestep))
        down = self.down(self.conv_in(sample), time)
        low = self.attentions[0](self.mid(self.downsample(down), time), encoder_hidden_states)
        up = self.attentions[1](self.up(torch.cat([self.upsample(low), down], 1), time), encoder_hidden_states)
        return self.conv_out(up)


def _seen() -> dict[str, Tensor]:
    """Rows in which four patches of an image, made one token, come before the text."""
    image = torch.tensor([62, 60, 63]).expand(3, 3)
    return {
        "input_ids": torch.cat([image, _IDS], 1),
        "pixel_values": torch.randn(12, 3 * 2 * 4 * 4, generator=_GENERATOR),
        "image_grid_thw": torch.tensor([[1, 2, 2]] * 3),
    }


_TEXTS = {"input_ids": _IDS}
_PICTURES = {"pixel_values": _IMAGES}

ARCHITECTURES = {
    "Qwen3-MoE": Architecture(
        _of("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **_GROUPED, num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=8),
        _TEXTS, ["q_proj", "v_proj", "embed_tokens"], _EXPERTS,
    ),
    "Mixtral": Architecture(
        _of("MixtralForCausalLM", "MixtralConfig", **_GROUPED, num_local_experts=4),
        _TEXTS, ["q_proj", "v_proj"], [*_EXPERTS, "gate.weight"],
    ),
    "gpt-oss": Architecture(
        _of("GptOssForCausalLM", "GptOssConfig", **_GROUPED, num_local_experts=4, num_experts_per_tok=2),
        _TEXTS, ["q_proj", "o_proj"], _EXPERTS,
    ),
    "DeepSeek-V3": Architecture(
        _of("DeepseekV3ForCausalLM", "DeepseekV3Config", **_TEXT, num_key_value_heads=2, n_routed_experts=4,
            num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=8, first_k_dense_replace=1,
            q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8),
        _TEXTS, ["q_a_proj", "kv_b_proj", "o_proj"], _EXPERTS,
    ),
    "Llama-4": Architecture(
        _of("Llama4ForCausalLM", "Llama4TextConfig", **_GROUPED, num_local_experts=4, intermediate_size_mlp=24,
            interleave_moe_layer_step=1),
        _TEXTS, ["q_proj", "shared_expert.down_proj", "embed_tokens"], _EXPERTS,
    ),
    "Whisper": Architecture(
        _of("WhisperForConditionalGeneration", "WhisperConfig", **_TEXT, d_model=16, encoder_layers=1,
            decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
            decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=6, max_target_positions=12,
            decoder_start_token_id=1),
        {"input_features": torch.randn(3, 8, 12, generator=_GENERATOR), "decoder_input_ids": _IDS},
        ["q_proj", "fc1", "embed_tokens"],
    ),
    "CLIP": Architecture(
        _of("CLIPModel", "CLIPConfig", text_config={**_TEXT, "projection_dim": 16},
            vision_config={**_VISION, "projection_dim": 16}, projection_dim=16),
        {**_TEXTS, **_PICTURES}, ["q_proj", "fc2", "visual_projection", "patch_embedding", "token_embedding"],
    ),
    "ViT": Architecture(
        _of("ViTForImageClassification", "ViTConfig", **_VISION), _PICTURES, ["q_proj", "v_proj", "projection"]
    ),
    "ConvNeXt": Architecture(
        _of("ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2,
            layer_scale_init_value=1.0),
        _PICTURES, ["pwconv1", "pwconv2", "patch_embeddings", "downsampling_layer.1"],
    ),
    "ResNet": Architecture(
        _of("ResNetForImageClassification", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
            layer_type="basic"),
        _PICTURES, ["convolution"],
    ),
    "a UNet as Stable Diffusion's": Architecture(
        lambda: make(_UNet, 8),  # type: ignore[arg-type]
        {"sample": _IMAGES, "timestep": torch.tensor([[0.1], [0.5], [0.9]]),
         "encoder_hidden_states": torch.randn(3, 5, 16, generator=_GENERATOR)},
        ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "time_emb_proj"],
    ),
    "Mamba-2": Architecture(
        _of("Mamba2ForCausalLM", "Mamba2Config", **_TEXT, state_size=4, num_heads=4, head_dim=8, n_groups=2,
            chunk_size=4),
        _TEXTS, ["in_proj", "embeddings"],
    ),
    "T5": Architecture(
        _of("T5ForConditionalGeneration", "T5Config", **_TEXT, d_model=16, d_kv=8, d_ff=24, num_layers=1,
            num_heads=2, decoder_start_token_id=0),
        {**_TEXTS, "decoder_input_ids": _IDS}, ["q", "v", "wi", "relative_attention_bias"],
    ),
    "ModernBERT": Architecture(
        _of("ModernBertForSequenceClassification", "ModernBertConfig", **_TEXT, num_labels=3, cls_token_id=1,
            sep_token_id=2),
        _TEXTS, ["Wqkv", "Wi", "Wo", "tok_embeddings"],
    ),
    "Gemma-3": Architecture(
        _of("Gemma3ForCausalLM", "Gemma3TextConfig", **_GROUPED), _TEXTS, ["q_proj", "down_proj", "embed_tokens"]
    ),
    "Qwen2.5-VL (`language_model` within, by a pattern)": Architecture(
        _of("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", image_token_id=60, video_token_id=61,
            vision_start_token_id=62, vision_end_token_id=63, tie_word_embeddings=False,
            text_config={**_TEXT, "num_key_value_heads": 1, "max_position_embeddings": 64,
                         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
            vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24,
                           "out_hidden_size": 16, "patch_size": 4, "spatial_merge_size": 2,
                           "temporal_patch_size": 2, "window_size": 16, "fullatt_block_indexes": [0]}),
        _seen(), r".*language_model.*\.(q_proj|down_proj|embed_tokens)|.*visual.*\.(qkv|patch_embed\.proj)",
    ),
}  # fmt: skip


def trained(architecture: Architecture, folder: Path) -> None:
    """Save an adapter after three steps towards an output of 0, its output, and the losses."""
    model = architecture.adapted()
    with torch.no_grad():
        adapter_of(model).theta_d.mul_(10.0)  # it begins so small that experts hardly show
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        loss = architecture.output(model).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(folder)
    with torch.no_grad():
        save_file({"output": architecture.output(model).contiguous()}, folder / "output.safetensors")
    (folder / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message=".*could not be probed")
    for name, architecture in ARCHITECTURES.items():
        trained(architecture, Path(sys.argv[1]) / name)
