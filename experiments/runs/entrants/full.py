"""Full fine-tuning: every number of the base is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from experiments.checks import check_type
from experiments.errors import ExperimentError
from experiments.models import Family
from experiments.runs.config import RANK, RunConfig
from experiments.runs.entrants.adapter import check_tensors
from experiments.runs.entrants.entrant import Entrant, check_options, parts
from experiments.runs.shapes import bare, family_class

_FILES = "model*.safetensors"
# of an option: whether the weights stay in the folder of the run
_KEEP = "keep"


class Full(Entrant):
    """In float32 whatever `base_dtype` says, which is that of frozen weights; `dtype` is the arithmetic's.

    The weights of a finished run are not kept, unless its options say `keep: true`.
    """

    def settled(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        given = dict(settings.get("hyperparameters", {}))
        check_options(self.name, given, (_KEEP,))
        check_type(f"config: {_KEEP} of {self.name}", given.get(_KEEP, False), bool)
        return {"r": settings.get("r", RANK), "d": None, "budget": None, "hyperparameters": given}

    def count(self, config: RunConfig) -> int:
        own, _ = parts(bare(config), family_class(config).heads)
        return sum(p.numel() for p in own.values())

    def check(self, config: RunConfig) -> None:
        if config.quantization:
            raise ExperimentError(
                f"config: full must train weights of floats, got a base quantised as {config.quantization}. Leave "
                "quantization out for it, or choose an adapter."
            )

    def attach(self, base: PreTrainedModel, config: RunConfig, family: Family | type[Family]) -> PreTrainedModel:
        return base.float().requires_grad_(True)

    def save(self, model: PreTrainedModel, folder: Path, config: RunConfig) -> Path | None:
        if not config.hyperparameters.get(_KEEP):
            return None
        model.save_pretrained(folder, max_shard_size="1TB")
        return next(folder.glob(_FILES))

    def load(self, model: Any, folder: Path) -> None:
        files = sorted(folder.glob(_FILES))
        if not files:
            raise ExperimentError(
                f"results: {folder} must hold the weights of the run, got none: those of full fine-tuning are kept "
                "where the sweep says {full: {keep: true}}. Train it again so."
            )
        state = {name: tensor for file in files for name, tensor in load_file(file).items()}
        model.load_state_dict(state, strict=False)
        # of tied weights one name is in the file
        given = {p.data_ptr() for name, p in model.named_parameters(remove_duplicate=False) if name in state}
        if lost := [name for name, p in model.named_parameters() if p.data_ptr() not in given]:
            raise ExperimentError(
                f"results: {folder} must hold every weight of the model, got no {lost[0]}. Train it again."
            )

    def restored(self, base: PreTrainedModel, folder: Path) -> nn.Module:
        model = base.float()
        self.load(model, folder)
        return model

    def check_saved(self, folder: Path) -> None:
        for file in sorted(folder.glob(_FILES)) or [folder / "model.safetensors"]:
            check_tensors(file)
