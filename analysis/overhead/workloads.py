"""The models that adapters are attached to: packaged ones on the CPU, random weights of published shapes on a GPU."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from analysis.overhead.problem import SEED
from analysis.overhead.shapes import LLAMA_31_8B, LLAMA_32_3B, TINY, Llama

_ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPT = 8


@dataclass(frozen=True)
class Workload:
    """A model and the work that is timed on it.

    d: length of theta_d where a method leaves it free; batch: (rows, tokens) of a training step; new_tokens: how many
    are generated greedily after a prompt of 8, or 0 for a model that classifies, where inference is one forward.
    """

    load: Callable[[], PreTrainedModel]
    targets: tuple[str, ...]
    task_type: str
    vocabulary: int
    d: int
    batch: tuple[int, int]
    new_tokens: int

    def training_batch(self, device: torch.device) -> dict[str, Tensor]:
        """Random tokens with labels, the same for every method."""
        ids = torch.randint(self.vocabulary, self.batch, generator=torch.Generator().manual_seed(SEED)).to(device)
        labels = ids if self.new_tokens else ids[:, 0] % 2
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def prompt(self, device: torch.device) -> dict[str, Tensor]:
        """One row: the start of a generation, or the whole input of an encoder."""
        batch = self.training_batch(device)
        length = PROMPT if self.new_tokens else self.batch[1]
        return {key: batch[key][:1, :length] for key in ("input_ids", "attention_mask")}

    def shapes(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of every module that is adapted."""
        found = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in self.targets:
                found[name] = (module.out_features, module.in_features)
        return found


def greedy(new_tokens: int) -> dict[str, Any]:
    """What `generate` must be told to decode exactly so many tokens."""
    return {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}


def _random(shape: Llama, vocabulary: int, tied: bool) -> Callable[[], PreTrainedModel]:
    def load() -> PreTrainedModel:
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            tie_word_embeddings=tied,
        )
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)

    return load


def _classifier(name: str) -> PreTrainedModel:
    from experiments import models  # which needs packages that random weights do without

    return models.load_classifier(models.BaseModel(name), 2, 0, seed=SEED)


def _unpacked(name: str) -> PreTrainedModel:
    """The model, kept as safetensors in the temporary folder of all measurements: a GGUF file takes 12 s to parse."""
    from experiments import models

    folder = Path(tempfile.gettempdir()) / f"base-{name}"
    if not folder.exists():
        part = Path(tempfile.mkdtemp())
        models.load_causal(models.BaseModel(name)).save_pretrained(part)
        part.rename(folder)
    return models.load_causal(models.BaseModel(str(folder)))


WORKLOADS = {
    "minilm": Workload(
        lambda: _classifier("minilm"),
        ("query", "value"),
        "SEQ_CLS",
        vocabulary=30_522,
        d=4_740,
        batch=(4, 64),
        new_tokens=0,
    ),
    "smollm2": Workload(
        lambda: _unpacked("smollm2"),
        _ALL_LINEAR,
        "CAUSAL_LM",
        vocabulary=49_152,
        d=131_072,
        # few tokens: the whole run must end in half an hour, and fewer only make an adapter's own cost weigh more
        batch=(1, 32),
        new_tokens=4,
    ),
    "Llama-3.2-3B shape": Workload(
        _random(LLAMA_32_3B, 128_256, tied=True), _ALL_LINEAR, "CAUSAL_LM", 128_256, 524_288, (4, 512), 32
    ),
    "Llama-3.1-8B shape": Workload(
        _random(LLAMA_31_8B, 128_256, tied=False), _ALL_LINEAR, "CAUSAL_LM", 128_256, 524_288, (4, 512), 32
    ),
    "tiny": Workload(_random(TINY, 256, tied=True), _ALL_LINEAR, "CAUSAL_LM", 256, 128, (2, 16), 4),
}
DEFAULT = {"cpu": ("minilm", "smollm2"), "cuda": ("Llama-3.2-3B shape", "Llama-3.1-8B shape")}


def load(name: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model of `make` twice; both are copies, so that the weights of neither are pages of a file."""
    model = make(name, device)
    return copy.deepcopy(model), copy.deepcopy(model)


def make(name: str, device: torch.device) -> PreTrainedModel:
    """The model on its device: float32 on the CPU, bfloat16 on a GPU, where random weights are also drawn."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = WORKLOADS[name].load()
    finally:
        torch.set_default_dtype(before)
    return model.to(device=device, dtype=dtype)
