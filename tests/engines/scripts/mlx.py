# /// script
# dependencies = ["mlx[cpu]==0.32.4", "mlx-lm==0.32.2"]
# [tool.uniproj]
# label = "MLX"
# format = "mlx"
# precision = "float32_mlx"
# packages = ["mlx", "mlx-lm"]
# ///
"""mlx-lm on the CPU. A model of its has one adapter, so each user gets a model."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.generate import generate_step


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    # where Transformers 5 writes it mlx-lm does not look for it in a Llama, and takes 10,000
    theta = json.loads((Path(asked["base"]) / "config.json").read_text())["rope_parameters"]["rope_theta"]
    users = {}
    for user, adapter in asked["adapters"].items():
        model, _ = load(asked["base"], adapter_path=adapter, model_config={"rope_theta": theta})
        users[user] = [_continuation(model, prompt, asked["new_tokens"]) for prompt in asked["prompts"]]
    return {"users": users, "together": False}


def _continuation(model: Any, prompt: list[int], count: int) -> dict[str, list]:
    # greedy unless told otherwise
    steps = [(int(token), _normalised(row)) for token, row in generate_step(mx.array(prompt), model, max_tokens=count)]
    return {"tokens": [token for token, _ in steps], "logprobs": [float(row[token]) for token, row in steps]}


def _normalised(logprobs: mx.array) -> np.ndarray:
    """Without what mx.logsumexp loses on the CPU, where its float32 is off by 2e-4 over 49,152 tokens."""
    row = np.array(logprobs, dtype=np.float64)
    return row - np.log(np.exp(row).sum())
