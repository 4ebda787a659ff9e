"""Entrants that PEFT attaches: what is trained lies in an adapter's folder, and the base stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from experiments.files import read_json
from experiments.runs.config import RunConfig
from experiments.runs.entrants.entrant import Entrant

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Adapter(Entrant):
    """Saved and loaded by PEFT's own functions."""

    def save(self, model: PeftModel, folder: Path, config: RunConfig) -> Path:
        model.save_pretrained(folder)
        return folder / _WEIGHTS

    def load(self, model: Any, folder: Path) -> None:
        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))

    def restored(self, base: PreTrainedModel, folder: Path) -> nn.Module:
        return PeftModel.from_pretrained(base, folder)

    def check_saved(self, folder: Path) -> None:
        read_json(folder / _CONFIG)
        check_tensors(folder / _WEIGHTS)


def check_tensors(file: Path) -> None:
    """Raises an error of safetensors for a file that is missing, cut off or none of its kind."""
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            tensors.get_tensor(name)
