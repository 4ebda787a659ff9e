"""The configuration of one run: everything that decides its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from experiments.errors import ExperimentError
from experiments.models import adapted_shapes
from uniproj.registry import get

REFERENCE = "lora"
COMPARED = (
    "lora",
    "unilora",
    "unilora_local",
    "unilora_nonuniform",
    "fastfood",
    "vera",
    "tied_lora",
    "vblora",
    "lora_xs",
)
RANK = 4
# VeRA's count is the least adjustable: sum(out) + r M. Its value at r = 11 is near what the others can reach.
VERA_RANK = 11


@dataclass(frozen=True)
class RunConfig:
    """One run. `budget` is None for the unconstrained reference; `score_on` is "validation" while tuning.

    lr is the peak rate of theta_d and of a learned P, head_lr that of the classification head.
    """

    task: str
    model: str
    projection: str
    version: int
    r: int
    d: int | None
    hyperparameters: Mapping[str, Any]
    budget: int | None
    lr: float
    projection_seed: int
    init_seed: int
    data_seed: int
    train_seed: int
    score_on: str = "test"
    device: str = "cpu"
    head_lr: float = 1e-3
    train_size: int = 1600
    epochs: int = 2
    batch_size: int = 16
    max_length: int = 64
    warmup: float = 0.1
    dtype: str = "float32"

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunConfig:
        """Raises ExperimentError for missing or unknown keys."""
        if difference := sorted({f.name for f in fields(cls)} ^ set(values)):
            raise ExperimentError(
                f"config: a run must have the keys of RunConfig, got a difference in {difference}. "
                "Another version wrote it: move the folder away."
            )
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def default_budget(model: str) -> int:
    """Trained numbers that every method can come near to on this model."""
    shapes = adapted_shapes(model)
    return sum(out for out, _ in shapes.values()) + VERA_RANK * len(shapes)


def make(
    task: str, model: str, projection: str, budget: int, seed: int, lr: float, score_on: str, device: str
) -> RunConfig:
    """The run of one projection at a budget of trained numbers, with all four seeds equal to `seed`."""
    cls = get(projection)
    reference = projection == REFERENCE
    fitted = None if reference else cls.for_budget(adapted_shapes(model), budget, RANK)
    return RunConfig(
        task=task,
        model=model,
        projection=projection,
        version=cls.version,
        r=fitted.r if fitted else RANK,
        d=fitted.d if fitted else None,
        hyperparameters=dict(fitted.hyperparameters) if fitted else {},
        budget=None if reference else budget,
        lr=lr,
        projection_seed=seed,
        init_seed=seed,
        data_seed=seed,
        train_seed=seed,
        score_on=score_on,
        device=device,
        dtype="bfloat16" if device == "cuda" else "float32",
    )
