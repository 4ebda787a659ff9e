# /// script
# dependencies = [
#     "diffusers==0.42.1", "torch==2.13.0", "peft==0.21.2", "transformers==5.23.0", "accelerate==1.15.0",
#     "numpy==2.4.6", "scipy==1.17.1", "safetensors==0.8.0", "pydantic==2.14.3", "regex==2026.11.15", "wrapt==2.5.2",
# ]
# [tool.uniproj]
# label = "diffusers"
# format = "diffusers"
# precision = "float32"
# answers = "images"
# packages = ["diffusers", "peft", "torch"]
# ///
"""What a Stable Diffusion and a Flux pipeline, small and with random weights, make of a prompt.

uniproj works beside diffusers here: an adapter for each user is attached to the UNet or the transformer, saved and
exported. Asked: the repository, and the lines of the page, which load a pipeline `pipe` with both adapters from the
folder that they run in.
"""

import string
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import get_peft_model
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

USERS = ("ada", "bob")
SETTINGS = {
    "r": 4,
    "lora_alpha": 6,
    "rank_pattern": {"to_v": 2},
    "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
}


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    sys.path.insert(0, asked["repository"])
    return {"models": {part: _images(part, asked["lines"]) for part in PIPELINES}}


@torch.no_grad()
def _images(part: str, lines: str) -> dict[str, Any]:
    """Without an adapter, and ours and diffusers' by the users that are active, who share one weight."""
    from uniproj.exchange import export
    from uniproj.tuner import UniProjConfig, adapter_of

    Path(part).mkdir()
    with chdir(part):
        torch.manual_seed(0)
        PIPELINES[part]().save_pretrained("base")
        pipe = DiffusionPipeline.from_pretrained("base")
        plain = _image(pipe)
        model = get_peft_model(getattr(pipe, part), UniProjConfig(**SETTINGS), adapter_name=USERS[0])
        model.add_adapter(USERS[1], UniProjConfig(**SETTINGS))
        ours, changes = {}, {}
        for seed, user in enumerate(USERS):
            model.set_adapter(user)
            theta_d = adapter_of(model, user).theta_d
            theta_d.copy_(torch.randn(theta_d.shape, generator=torch.Generator().manual_seed(seed)))
            ours[user] = _image(pipe)
            layers = {name: m for name, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
            changes[user] = {name: layer.get_delta_weight(user) for name, layer in layers.items()}
            model.save_pretrained("ours", selected_adapters=[user])
            export(f"ours/{user}", user, to="diffusers")
        pipe = DiffusionPipeline.from_pretrained("base")
        for user in USERS:
            for name, change in changes[user].items():
                getattr(pipe, part).get_submodule(name).weight += change / len(USERS)
        ours["both"] = _image(pipe)
        space: dict[str, Any] = {}
        exec(lines, space)
        pipe, theirs = space["pipe"], {}
        theirs["both"] = _image(pipe)
        for user in USERS:
            pipe.set_adapters(user)
            theirs[user] = _image(pipe)
    images = {"plain": {"": plain}, "ours": ours, "theirs": theirs}
    return {whose: {users: image.tolist() for users, image in made.items()} for whose, made in images.items()}


def _image(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    size = {"height": 8, "width": 8, "num_inference_steps": 2}
    return pipe("a cat", generator=generator, output_type="latent", **size).images


def _text(hidden: int) -> dict[str, Any]:
    ends = ["<|startoftext|>", "<|endoftext|>"]
    words = [*ends, *string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=hidden,
        projection_dim=hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=8)
    return {"text_encoder": CLIPTextModel(config), "tokenizer": tokenizer}


def _text_2(hidden: int) -> dict[str, Any]:
    pieces = [(piece, -1.0) for piece in ("<pad>", "</s>", "<unk>", "\u2581", *string.ascii_lowercase)]
    config = T5Config(vocab_size=len(pieces), d_model=hidden, d_kv=8, d_ff=hidden, num_layers=1, num_heads=2)
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=8)
    return {"text_encoder_2": T5EncoderModel(config), "tokenizer_2": tokenizer}


def _stable_diffusion() -> DiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    guards = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(unet=unet, vae=vae, scheduler=scheduler, **_text(12), **guards)


def _flux() -> DiffusionPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=1)
    scheduler = FlowMatchEulerDiscreteScheduler()
    return FluxPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **_text(32), **_text_2(32))


# by the name of the part that is adapted
PIPELINES = {"unet": _stable_diffusion, "transformer": _flux}
