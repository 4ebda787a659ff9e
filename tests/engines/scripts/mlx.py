# /// script
# dependencies = ["mlx[cpu]==0.32.4", "mlx-lm==0.32.2"]
# [tool.uniproj]
# label = "MLX"
# format = "mlx"
# precision = "float32"
# packages = ["mlx", "mlx-lm"]
# ///
"""mlx-lm on the CPU. A model of its has one adapter, so each user gets a model."""

from typing import Any

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    users = {}
    for user, adapter in asked["adapters"].items():
        model, _ = load(asked["base"], adapter_path=adapter)
        users[user] = [_continuation(model, prompt, asked["new_tokens"]) for prompt in asked["prompts"]]
    return {"users": users, "together": False}


def _continuation(model: Any, prompt: list[int], count: int) -> dict[str, list]:
    # greedy unless told otherwise
    steps = [(int(token), logprobs) for token, logprobs in generate_step(mx.array(prompt), model, max_tokens=count)]
    return {"tokens": [token for token, _ in steps], "logprobs": [logprobs[token].item() for token, logprobs in steps]}
