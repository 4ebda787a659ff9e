"""Entrants of comparisons as methods of the model part: PEFT's by their own names, full fine-tuning, the head alone."""

from __future__ import annotations

from typing import Any

from analysis.overhead.problem import SEED
from analysis.overhead.workloads import Workload

# `experiments.runs` needs packages that a machine for projections alone does without: it is imported where it is needed


def is_entrant(name: str) -> bool:
    """Whether a name, with or without options behind a colon, is that of an entrant which is no projection."""
    return name.startswith("peft/") or name.partition(":")[0] in ("full", "head")


def check(text: str) -> None:
    """Raises ProjectionError, or ExperimentError, for what is no entrant."""
    from experiments.runs import entrants

    entrants.get(entrants.read(text)["projection"])


def attach(model: Any, work: Workload, name: str, rank: int) -> Any:
    """The model with an entrant, on the modules of the workload; a budget is none of this measurement's."""
    from experiments.models import family_of
    from experiments.runs import RunConfig, entrants

    family = family_of("causal" if work.new_tokens else "text")
    seeds = dict.fromkeys(("projection_seed", "init_seed", "data_seed", "train_seed"), SEED)
    asked: dict[str, Any] = {
        "task": "overhead",
        "model": "a workload",
        "r": rank,
        "lr": 1.0,
        "target_modules": list(work.targets),
    }
    asked |= entrants.read(name)
    entrant = entrants.get(asked["projection"])
    config = RunConfig(**{**asked, **seeds, "version": entrant.version, **entrant.settled(asked)})
    return entrant.attach(model, config, family)
