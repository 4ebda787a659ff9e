"""The settings of one run: everything that decides its numbers. Reading them needs no model and no projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from experiments.errors import ExperimentError
from experiments.tasks import HUB

# settings that came after the first records: left out at this value, so that a run keeps the id it had
_LATER: Mapping[str, Any] = {"metric": None}
# steps between two logged losses
LOGGING_STEPS = 10
# what others are compared with, at its own size
REFERENCE = "lora"
# of factors, where a run does not say it
RANK = 4
SEEDS = ("projection_seed", "init_seed", "data_seed", "train_seed")


@dataclass(frozen=True)
class RunConfig:
    """One run, resolved: no setting is left to be worked out.

    projection: an entrant by its name, a projection or another (`experiments.runs.entrants`). What is adapted: r,
    d (None where the layout decides it), hyperparameters (of P, or options of a PEFT method), target_modules (None:
    PEFT's for this type of model; "all-linear"), budget (trained numbers asked for; None for what stands at its own
    size, as the reference does, and for a given d or option). Rates: lr of what the entrant trains, head_lr of a fresh
    head beside it. Rows: train_size of the training rows, drawn by data_seed, of which label_noise (a fraction)
    exchange their labels; validation_size and test_size rows are scored.
    evaluations: how often a run is scored on the validation split, evenly spread; the best and the last count.
    dtype: of the arithmetic (autocast); base_dtype: of the frozen weights; alpha: scale = alpha / r, None for 1;
    revision: of the model on the hub. metric: the one that ranks, None for the task's own.
    score_on: "validation" while tuning, "test" once the choice is locked.
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
    data: str = HUB
    plugins: Sequence[str] = field(default_factory=list)
    target_modules: Sequence[str] | str | None = None
    score_on: str = "test"
    device: str = "cpu"
    head_lr: float = 1e-3
    train_size: int | None = None
    validation_size: int | None = None
    test_size: int | None = None
    label_noise: float = 0.0
    epochs: float = 2
    batch_size: int = 16
    accumulation: int = 1
    max_length: int = 64
    max_new_tokens: int = 256
    scheduler: str = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.0
    head_weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: str = "adamw_torch"
    dropout: float = 0.0
    gradient_checkpointing: bool = False
    quantization: str | None = None
    evaluations: int = 1
    timing: bool = False
    dtype: str = "float32"
    base_dtype: str = "float32"
    alpha: int | None = None
    revision: str | None = None
    metric: str | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunConfig:
        """Raises ExperimentError for missing or unknown keys."""
        values = {**_LATER, **values}
        if difference := sorted({f.name for f in fields(cls)} ^ set(values)):
            raise ExperimentError(
                f"config: a run must have the keys of RunConfig, got a difference in {difference}. "
                "Another version wrote it: move the folder away."
            )
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key not in _LATER or value != _LATER[key]}
