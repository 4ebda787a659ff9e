"""Formats of other methods: PEFT's own tuners, and the LoRA folders that vLLM reads."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TinyLoraConfig, UniLoraConfig, VBLoRAConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file

from tests.compatibility.subjects import IDS, ROUNDING, TARGETS, D, Refuses, Remark, llama, logits, same, saved
from uniproj.exchange import export, from_peft, to_peft

capability = partial(pytest.mark.capability, "Other formats")
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


@capability("PEFT's `{kind}`: `from_peft`, `to_peft`")
@pytest.mark.parametrize("kind", METHODS)
def test_from_peft_to_peft(kind: str) -> None:
    model, twin = _theirs(kind), _theirs(kind)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    to_peft(*from_peft(model), twin)
    same(logits(twin.eval()), logits(model.eval()), "logits", ROUNDING)


@capability("export to PEFT's `LORA`, from the file alone; also padded to a rank")
def test_export_to_peft_s_lora_from_the_file_alone_also_padded_to_a_rank(tmp_path: Path) -> None:
    path, expected = saved(tmp_path)
    for rank in (None, 16):
        export(path, tmp_path / str(rank), rank=rank)
        same(logits(PeftModel.from_pretrained(llama(), tmp_path / str(rank))), expected, "logits", 1e-6)


@capability("export to PEFT's `{kind}`")
@pytest.mark.parametrize("kind", ["UNILORA", "VERA", "VBLORA", "TINYLORA"])
def test_export_to_peft(kind: str, tmp_path: Path) -> None:
    name = kind.lower()
    path, expected = saved(tmp_path, projection=name, d=D if name == "unilora" else None)
    export(path, tmp_path / "out", to=name, base=llama())
    same(logits(PeftModel.from_pretrained(llama(), tmp_path / "out")), expected, "logits", ROUNDING)


@capability("vLLM's format: a rank it knows, no patterns, A and B alone; `rank_pattern` is unified")
def test_vllm_s_format_a_rank_it_knows_no_patterns_a_and_b_alone_rank_pattern_is_unified(
    tmp_path: Path, remark: Remark
) -> None:
    path, expected = saved(tmp_path, rank_pattern={"v_proj": 2})
    export(path, tmp_path / "out", to="vllm")
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert written["r"] in VLLM_RANKS and not written["rank_pattern"]
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    same(logits(PeftModel.from_pretrained(llama(), tmp_path / "out")), expected, "logits", 1e-6)
    remark("by its documented rules")


@capability("vLLM's format: an adapter with a classification head")
def test_vllm_s_format_an_adapter_with_a_classification_head(tmp_path: Path, refuses: Refuses) -> None:
    path, _ = saved(tmp_path, modules_to_save=["lm_head"])
    with refuses():
        export(path, tmp_path / "out", to="vllm")
