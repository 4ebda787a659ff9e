"""Small models of real architectures, built from their configurations, the same weights on every call."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
)

from uniproj.tuner import UniProjConfig

VOCABULARY = 64
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
TASKS = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM"}


def make(architecture: type, model_config: PreTrainedConfig) -> Any:
    """A model with the same weights on every call; in eval mode."""
    torch.manual_seed(0)
    model = architecture(model_config)
    with torch.no_grad():  # the default initial weights are so small that an adapter hardly shows
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model.eval()


def base_model(kind: str, **fields: Any) -> Any:
    """kind: bert, llama (grouped-query attention) or gpt2 (Conv1D, fused qkv). fields: of its configuration."""
    given = {**SIZES, "intermediate_size": 48, **fields}
    if kind == "bert":
        return make(BertForSequenceClassification, BertConfig(**given, num_labels=3))
    if kind == "llama":
        return make(LlamaForCausalLM, LlamaConfig(**given, num_key_value_heads=2))
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return make(GPT2LMHeadModel, GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, **off))


def config(kind: str, projection: str = "unilora", d: int | None = 60, **fields) -> UniProjConfig:
    options = {"r": 4, "target_modules": TARGETS[kind], "task_type": TASKS[kind], **fields}
    return UniProjConfig(projection=projection, d=d, **options)


def batch(kind: str, rows: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (rows, 9), generator=generator)
    labels = torch.randint(0, 3, (rows,), generator=generator) if kind == "bert" else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def train_steps(model: torch.nn.Module, kind: str, steps: int = 3, lr: float = 0.05) -> list[float]:
    """A few steps of Adam on one batch; the losses."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(**batch(kind)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model: torch.nn.Module, kind: str = "llama") -> torch.Tensor:
    return model(**batch(kind)).logits
