"""Export and import on pretrained models: the logits stay, to 1e-6 of the largest."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel, UniLoraConfig, VBLoRAConfig, VeraConfig, get_peft_model
from torch import Tensor, nn

from experiments import models
from tests.adapters.tools import SAME, difference
from uniproj import get
from uniproj.adapters.exchange import export, import_adapter
from uniproj.tuner import UniProjConfig

TARGETS = {"minilm": ["query", "value"], "smollm2": ["q_proj", "v_proj", "down_proj"]}
TASKS = {"minilm": "SEQ_CLS", "smollm2": "CAUSAL_LM"}
TEXTS = ["A quiet film that stays with you.", "Two hours I would like to have back.", "Why is the sky blue?"]

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
each_base = pytest.mark.parametrize("name", TARGETS)


@cache
def _original(name: str) -> nn.Module:
    base = models.Base(name)
    return models.load_causal(base) if name == "smollm2" else models.load_classifier(base, 2, None, seed=0)


def _base(name: str) -> nn.Module:
    return copy.deepcopy(_original(name))


@torch.no_grad()
def _logits(model: nn.Module, name: str) -> Tensor:
    tokens = models.load_tokenizer(name)(TEXTS, padding=True, return_tensors="pt")
    found: Tensor = model(**tokens).logits
    return found[tokens["attention_mask"].bool()] if found.ndim == 3 else found


def _moved(model: PeftModel) -> PeftModel:
    """The adapter away from its start, so far that it shows in every logit."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad and p.ndim == 1):
            size = parameter.abs().mean().clamp_min(0.02)
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _ours(name: str, projection: str) -> PeftModel:
    d = 2000 if get(projection).free_d else None
    places = {"target_modules": TARGETS[name], "task_type": TASKS[name]}
    return _moved(get_peft_model(_base(name), UniProjConfig(projection=projection, d=d, r=4, lora_alpha=8, **places)))


def _reported(what: str, found: Tensor, wanted: Tensor) -> None:
    print(f"{what}: {difference(found, wanted):.2e}")
    assert difference(found, wanted) <= SAME


@each_base
@pytest.mark.parametrize("projection", ["unilora", "fastfood", "vera", "vblora", "lora_xs"])
def test_lora(name: str, projection: str, tmp_path: Path) -> None:
    model = _ours(name, projection)
    wanted = _logits(model, name)
    assert difference(wanted, _logits(_base(name), name)) > 1e3 * SAME  # else equal logits say nothing
    model.save_pretrained(str(tmp_path / "ours"))
    base = _base(name) if get(projection).needs_base_weights else None
    for rank in (None, 16):
        export(tmp_path / "ours", tmp_path / f"lora-{rank}", rank=rank, base=base)
        again = PeftModel.from_pretrained(_base(name), str(tmp_path / f"lora-{rank}")).eval()
        _reported(f"{name} {projection} to LoRA, rank {rank}", _logits(again, name), wanted)


@each_base
@pytest.mark.parametrize(
    ("projection", "method"),
    [("unilora", "unilora"), ("unilora_local", "unilora"), ("vera", "vera"), ("vblora", "vblora")],
)
def test_pefts_methods(name: str, projection: str, method: str, tmp_path: Path) -> None:
    model = _ours(name, projection)
    wanted = _logits(model, name)
    model.save_pretrained(str(tmp_path / "ours"))
    export(tmp_path / "ours", tmp_path / "theirs", to=method)
    theirs = PeftModel.from_pretrained(_base(name), str(tmp_path / "theirs")).eval()
    _reported(f"{name} {projection} to {method}", _logits(theirs, name), wanted)
    report = import_adapter(tmp_path / "theirs", tmp_path / "back", base=_base(name))
    back = PeftModel.from_pretrained(_base(name), str(tmp_path / "back")).eval()
    assert report["projection"] == projection
    _reported(f"{name} {method} to {projection}", _logits(back, name), wanted)


@each_base
@pytest.mark.parametrize(
    "config", [UniLoraConfig(theta_d_length=2000), VeraConfig(r=16), VBLoRAConfig(num_vectors=30, vector_length=64)]
)
def test_what_peft_made(name: str, config: UniLoraConfig | VeraConfig | VBLoRAConfig, tmp_path: Path) -> None:
    config.target_modules, config.task_type = TARGETS[name], TASKS[name]
    model = _moved(get_peft_model(_base(name), config))
    wanted = _logits(model, name)
    model.save_pretrained(str(tmp_path / "theirs"))
    report = import_adapter(tmp_path / "theirs", tmp_path / "ours", base=_base(name))
    ours = PeftModel.from_pretrained(_base(name), str(tmp_path / "ours")).eval()
    assert report["d"] < report["D"]
    _reported(f"{name} {config.peft_type.value} in", _logits(ours, name), wanted)
