"""Export and import on pretrained models: the logits stay, to 1e-6 of the largest."""

from __future__ import annotations

from collections.abc import Callable
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

BASES: dict[str, tuple[Callable[[], nn.Module], list[str], str]] = {
    "minilm": (lambda: models.load_classifier(models.Base("minilm"), 2, None, seed=0), ["query", "value"], "SEQ_CLS"),
    "smollm2": (lambda: models.load_causal(models.Base("smollm2")), ["q_proj", "v_proj", "down_proj"], "CAUSAL_LM"),
}
TEXTS = ["A quiet film that stays with you.", "Two hours I would like to have back.", "Why is the sky blue?"]

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
each_base = pytest.mark.parametrize("name", BASES)


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
    load, targets, task = BASES[name]
    d = 2000 if get(projection).free_d else None
    config = UniProjConfig(projection=projection, d=d, r=4, lora_alpha=8, target_modules=targets, task_type=task)
    return _moved(get_peft_model(load(), config))


def _reported(what: str, found: Tensor, wanted: Tensor) -> None:
    print(f"{what}: {difference(found, wanted):.2e}")
    assert difference(found, wanted) <= SAME


@each_base
@pytest.mark.parametrize("projection", ["unilora", "fastfood", "vera", "vblora", "lora_xs"])
def test_lora(name: str, projection: str, tmp_path: Path) -> None:
    load = BASES[name][0]
    model = _ours(name, projection)
    wanted = _logits(model, name)
    assert difference(wanted, _logits(load(), name)) > 1e3 * SAME  # else equal logits say nothing
    model.save_pretrained(str(tmp_path / "ours"))
    base = load() if get(projection).needs_base_weights else None
    for rank in (None, 16):
        export(tmp_path / "ours", tmp_path / f"lora-{rank}", rank=rank, base=base)
        again = PeftModel.from_pretrained(load(), str(tmp_path / f"lora-{rank}")).eval()
        _reported(f"{name} {projection} to LoRA, rank {rank}", _logits(again, name), wanted)


@each_base
@pytest.mark.parametrize(
    ("projection", "method"),
    [("unilora", "unilora"), ("unilora_local", "unilora"), ("vera", "vera"), ("vblora", "vblora")],
)
def test_pefts_methods(name: str, projection: str, method: str, tmp_path: Path) -> None:
    load = BASES[name][0]
    model = _ours(name, projection)
    wanted = _logits(model, name)
    model.save_pretrained(str(tmp_path / "ours"))
    export(tmp_path / "ours", tmp_path / "theirs", to=method)
    theirs = PeftModel.from_pretrained(load(), str(tmp_path / "theirs")).eval()
    _reported(f"{name} {projection} to {method}", _logits(theirs, name), wanted)
    report = import_adapter(tmp_path / "theirs", tmp_path / "back", base=load())
    back = PeftModel.from_pretrained(load(), str(tmp_path / "back")).eval()
    assert report["projection"] == projection
    _reported(f"{name} {method} to {projection}", _logits(back, name), wanted)


@each_base
@pytest.mark.parametrize(
    "config", [UniLoraConfig(theta_d_length=2000), VeraConfig(r=16), VBLoRAConfig(num_vectors=30, vector_length=64)]
)
def test_what_peft_made(name: str, config: UniLoraConfig | VeraConfig | VBLoRAConfig, tmp_path: Path) -> None:
    load, config.target_modules, config.task_type = BASES[name]
    model = _moved(get_peft_model(load(), config))
    wanted = _logits(model, name)
    model.save_pretrained(str(tmp_path / "theirs"))
    report = import_adapter(tmp_path / "theirs", tmp_path / "ours", base=load())
    ours = PeftModel.from_pretrained(load(), str(tmp_path / "ours")).eval()
    assert report["d"] < report["D"]
    _reported(f"{name} {config.peft_type.value} in", _logits(ours, name), wanted)
