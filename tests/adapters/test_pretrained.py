"""Export and import on pretrained models: the logits stay, but for the rounding of float32."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel, UniLoraConfig, VBLoRAConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file
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
    base = models.BaseModel(name)
    return models.load_causal(base) if name == "smollm2" else models.load_classifier(base, 2, None, seed=0)


def _base(name: str) -> nn.Module:
    return copy.deepcopy(_original(name))


@torch.no_grad()
def _logits(model: nn.Module, name: str) -> Tensor:
    tokens = models.load_tokenizer(name)(TEXTS, padding=True, return_tensors="pt")
    found: Tensor = model(**tokens).logits
    return found[tokens["attention_mask"].bool()] if found.ndim == 3 else found


def _moved(model: PeftModel, name: str) -> PeftModel:
    """The adapter away from its start, so far that it shows in the logits: else equal ones would say nothing."""
    generator, untouched = torch.Generator().manual_seed(0), _logits(_base(name), name)
    adapted = [
        parameter
        for key, parameter in model.eval().named_parameters()
        if parameter.requires_grad and "modules_to_save" not in key and "logits" not in key
    ]
    with torch.no_grad():
        for parameter in adapted:
            size = parameter.abs().mean().clamp_min(0.02)
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
        while difference(_logits(model, name), untouched) < 0.05:
            for parameter in adapted:
                parameter.mul_(2.0)
    return model


def _ours(name: str, projection: str) -> PeftModel:
    d = 2000 if get(projection).free_d else None
    places = {"target_modules": TARGETS[name], "task_type": TASKS[name]}
    return _moved(
        get_peft_model(_base(name), UniProjConfig(projection=projection, d=d, r=4, lora_alpha=8, **places)), name
    )


def _same_logits(what: str, name: str, found: nn.Module, wanted: nn.Module) -> None:
    """But for the rounding of other orders of summation, up to 30 layers deep (Llama's norms are float32 in both)."""
    for dtype in (torch.float32, torch.float64):
        measured = difference(_logits(found.to(dtype), name), _logits(wanted.to(dtype), name))
        print(f"\n{name} {what}, {str(dtype).removeprefix('torch.')}: {measured:.2e}")
        assert measured <= 5 * SAME


def _loaded(name: str, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(_base(name), str(folder)).eval()


@each_base
@pytest.mark.parametrize("projection", ["unilora", "fastfood", "vera", "vblora", "lora_xs"])
def test_lora(name: str, projection: str, tmp_path: Path) -> None:
    model = _ours(name, projection)
    wanted = _logits(model, name)
    model.save_pretrained(str(tmp_path / "ours"))
    base = _base(name) if get(projection).needs_base_weights else None
    export(tmp_path / "ours", tmp_path / "lora", base=base)
    assert difference(_logits(_loaded(name, tmp_path / "lora"), name), wanted) <= SAME
    export(tmp_path / "ours", tmp_path / "padded", rank=16, base=base)
    narrow, wide = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("lora", "padded"))
    for key in (key for key in narrow if "lora_" in key):
        (rows, columns), whole = narrow[key].shape, wide[key]
        assert 16 in whole.shape and torch.equal(whole[:rows, :columns], narrow[key])
        assert not whole[rows:].any() and not whole[:, columns:].any()
    # zeros change no sum, but the order in which a wider product is summed up
    _same_logits(f"{projection} to LoRA of rank 16", name, _loaded(name, tmp_path / "padded"), model)


@each_base
@pytest.mark.parametrize(
    ("projection", "method"),
    [("unilora", "unilora"), ("unilora_local", "unilora"), ("vera", "vera"), ("vblora", "vblora")],
)
def test_pefts_methods(name: str, projection: str, method: str, tmp_path: Path) -> None:
    model = _ours(name, projection)
    model.save_pretrained(str(tmp_path / "ours"))
    export(tmp_path / "ours", tmp_path / "theirs", to=method)
    _same_logits(f"{projection} to {method}", name, _loaded(name, tmp_path / "theirs"), model)
    report = import_adapter(tmp_path / "theirs", tmp_path / "back", base=_base(name))
    assert report["projection"] == projection
    _same_logits(f"{method} to {projection}", name, _loaded(name, tmp_path / "back"), _loaded(name, tmp_path / "ours"))


@each_base
@pytest.mark.parametrize(
    "config", [UniLoraConfig(theta_d_length=2000), VeraConfig(r=16), VBLoRAConfig(num_vectors=30, vector_length=64)]
)
def test_what_peft_made(name: str, config: UniLoraConfig | VeraConfig | VBLoRAConfig, tmp_path: Path) -> None:
    config = copy.deepcopy(config)
    config.target_modules, config.task_type = TARGETS[name], TASKS[name]
    model = _moved(get_peft_model(_base(name), config), name)
    model.save_pretrained(str(tmp_path / "theirs"))
    report = import_adapter(tmp_path / "theirs", tmp_path / "ours", base=_base(name))
    assert report["d"] < report["D"]
    _same_logits(f"{config.peft_type.value} in", name, _loaded(name, tmp_path / "ours"), model)
