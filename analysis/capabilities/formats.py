"""Formats of other methods: PEFT's own tuners, and the LoRA folders that vLLM reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TinyLoraConfig, UniLoraConfig, VBLoRAConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file

from analysis.capabilities.probe import check, probe
from analysis.capabilities.subjects import IDS, ROUNDING, TARGETS, llama, logits, same, saved
from uniproj.exchange import export, from_peft, to_peft

FORMATS = "Other formats"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
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


@probe(FORMATS, "export to PEFT's `LORA`, from the file alone; also padded to a rank")
def _(folder: Path) -> None:
    path, expected = saved(folder)
    for rank in (None, 16):
        export(path, folder / str(rank), rank=rank)
        same(logits(PeftModel.from_pretrained(llama(), folder / str(rank))), expected, "logits", 1e-6)


for _kind, _fields in (
    ("unilora", {}),
    ("vera", {"d": None, "projection": "vera"}),
    ("vblora", {"d": None, "projection": "vblora"}),
    ("tinylora", {"d": None, "projection": "tinylora"}),
):

    @probe(FORMATS, f"export to PEFT's `{_kind.upper()}`")
    def _(folder: Path, kind: str = _kind, fields: dict[str, Any] = _fields) -> None:
        path, expected = saved(folder, **fields)
        export(path, folder / "out", to=kind, base=llama())
        same(logits(PeftModel.from_pretrained(llama(), folder / "out")), expected, "logits", ROUNDING)


@probe(FORMATS, "vLLM's format: a rank it knows, no patterns, A and B alone; `rank_pattern` is unified")
def _(folder: Path) -> str:
    path, expected = saved(folder, rank_pattern={"v_proj": 2})
    export(path, folder / "out", to="vllm")
    written = json.loads((folder / "out" / "adapter_config.json").read_text())
    names = load_file(folder / "out" / "adapter_model.safetensors")
    check(written["r"] in VLLM_RANKS and not written["rank_pattern"], f"r is {written['r']}")
    check(all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names), f"got {sorted(names)[:3]}")
    same(logits(PeftModel.from_pretrained(llama(), folder / "out")), expected, "logits", 1e-6)
    return "by its documented rules; vLLM itself was not run"


@probe(FORMATS, "vLLM's format: an adapter with a classification head")
def _(folder: Path) -> None:
    path, _ = saved(folder, modules_to_save=["lm_head"])
    export(path, folder / "out", to="vllm")
