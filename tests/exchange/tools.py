"""Adapters that were trained for a few steps, and how far apart two models' logits are."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from tests.tuner.models import base_model, batch, config, train_steps
from uniproj import get

SAME = 1e-6


_trained: dict[str, PeftModel] = {}


def trained_model(kind: str, projection: str, **fields: Any) -> PeftModel:
    """A uniproj adapter after three steps on a small model, in eval mode; made once, so a test must not change it."""
    key = json.dumps([kind, projection, fields])
    if key not in _trained:
        size = {"d": 60 if get(projection).free_d else None}
        model = get_peft_model(base_model(kind), config(kind, projection, **size | fields))
        train_steps(model, kind)
        _trained[key] = model.eval()
    return _trained[key]


def saved(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(str(folder))
    return folder


def loaded(kind: str, folder: Path) -> PeftModel:
    """PEFT's own reading of a folder, onto a fresh base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base_model(kind), str(folder)).eval()


@torch.no_grad()
def logits(model: nn.Module, kind: str) -> Tensor:
    return model(**batch(kind)).logits


@torch.no_grad()
def difference(found: Tensor, wanted: Tensor) -> float:
    """Largest difference of two tensors relative to the largest entry."""
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def fields_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())
