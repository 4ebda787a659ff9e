"""Formats of other methods: PEFT's own tuners, and the LoRA folders that vLLM reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TinyLoraConfig, UniLoraConfig, VBLoRAConfig, VeraConfig, get_peft_model

from analysis.capabilities.probe import probe
from analysis.capabilities.subjects import IDS, ROUNDING, TARGETS, llama, logits, same
from uniproj.tuner import from_peft, to_peft

FORMATS = "Other formats"
METHODS: dict[str, Any] = {
    "LORA": (LoraConfig, {"r": 4, "init_lora_weights": False}),
    "UNILORA": (UniLoraConfig, {"r": 4, "theta_d_length": 60}),
    "VERA": (VeraConfig, {"r": 4}),
    "VBLORA": (VBLoRAConfig, {"r": 4, "num_vectors": 6, "vector_length": 16, "topk": 2}),
    "TINYLORA": (TinyLoraConfig, {"r": 2}),
}


def _theirs(kind: str) -> Any:
    config_class, fields = METHODS[kind]
    return get_peft_model(llama(), config_class(target_modules=TARGETS, task_type="CAUSAL_LM", **fields))


for _kind in METHODS:

    @probe(FORMATS, f"PEFT's `{_kind}`: `from_peft`, `to_peft`")
    def _(folder: Path, kind: str = _kind) -> None:
        model, twin = _theirs(kind), _theirs(kind)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        to_peft(*from_peft(model), twin)
        same(logits(twin.eval()), logits(model.eval()), "logits", ROUNDING)
