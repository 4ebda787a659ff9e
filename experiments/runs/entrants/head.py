"""The head alone, on a base that stays as it was: what every method must beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from transformers import PreTrainedModel

from experiments.errors import ExperimentError
from experiments.models import Family
from experiments.runs.config import RANK, RunConfig
from experiments.runs.entrants.adapter import Adapter
from experiments.runs.entrants.entrant import check_options
from experiments.runs.shapes import family_class


class Head(Adapter):
    """An adapter of PEFT's that adapts no module, so that a head is all that it trains and saves."""

    def settled(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        check_options(self.name, settings.get("hyperparameters", {}), ())
        return {"r": settings.get("r", RANK), "d": None, "budget": None, "hyperparameters": {}}

    def count(self, config: RunConfig) -> int:
        """None: a head is counted apart for every entrant."""
        return 0

    def check(self, config: RunConfig) -> None:
        _check_head(family_class(config), config.task)

    def attach(self, base: PreTrainedModel, config: RunConfig, family: Family | type[Family]) -> PeftModel:
        _check_head(family, config.task)
        heads = list(family.modules_to_save) if family.modules_to_save else None
        nothing = LoraConfig(target_modules=DUMMY_TARGET_MODULES, task_type=family.task_type, modules_to_save=heads)
        return get_peft_model(base, nothing)


def _check_head(family: Family | type[Family], task: str) -> None:
    if not family.heads:
        raise ExperimentError(
            f"config: head must train the fresh head of a classifier, got {task}, whose model has none. Choose `full`, "
            "or an adapter."
        )
