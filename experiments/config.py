"""The configuration of one run: everything that decides its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from experiments import plugins, tasks
from experiments.errors import ExperimentError
from experiments.families import adapted_shapes
from experiments.tasks.sources import HUB
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
SEEDS = ("projection_seed", "init_seed", "data_seed", "train_seed")


@dataclass(frozen=True)
class RunConfig:
    """One run, resolved: no setting is left to be worked out.

    What is adapted: r, d (None where the layout decides it), hyperparameters of P, target_modules (None: PEFT's for
    this type of model; "all-linear"), budget (trained numbers asked for; None for the reference and for a given d).
    Rates: lr of theta_d and a learned P, head_lr of a fresh head. Rows: train_size of the training rows, drawn by
    data_seed, of which label_noise (a fraction) exchange their labels; validation_size and test_size rows are scored.
    evaluations: how often a run is scored on the validation split, evenly spread; the best and the last count.
    dtype: of the arithmetic (autocast); base_dtype: of the frozen weights; alpha: scale = alpha / r, None for 1;
    revision: of the model on the hub. score_on: "validation" while tuning, "test" once the choice is locked.
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


def resolve(settings: Mapping[str, Any]) -> RunConfig:
    """The run of these settings: fields of RunConfig, and `seed` for those of the four seeds that are not given.

    A budget is solved by the projection's `for_budget`; a given d is taken as it is. Raises ExperimentError for
    unknown settings, missing ones and impossible values, ProjectionError for an unknown projection.
    """
    settings = dict(settings)
    seed = settings.pop("seed", None)
    settings |= {name: seed for name in SEEDS if settings.get(name) is None}
    known = {f.name for f in fields(RunConfig)} - {"version"}
    if unknown := sorted(set(settings) - known):
        raise ExperimentError(f"config: unknown settings {unknown}. Known: {', '.join(sorted(known))}.")
    if missing := sorted(name for name in ("task", "model", "projection", "lr", *SEEDS) if settings.get(name) is None):
        raise ExperimentError(f"config: a run needs {', '.join(missing)}, got none. Add it to the settings or axes.")
    plugins.load(settings.get("plugins", ()))
    cls = get(settings["projection"])
    config = RunConfig(**{"version": cls.version, **_UNSOLVED, **settings, **_sizes(settings)})
    _check(config)
    return config


_UNSOLVED: dict[str, Any] = {"r": 4, "d": None, "hyperparameters": {}, "budget": None}


def _sizes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """r, d, hyperparameters and budget of a run."""
    projection, budget, d = settings["projection"], settings.get("budget"), settings.get("d")
    r, given = settings.get("r", _UNSOLVED["r"]), dict(settings.get("hyperparameters") or {})
    if projection == REFERENCE:
        return {"r": r, "d": None, "budget": None, "hyperparameters": given}
    if (budget is None) == (d is None) and get(projection).free_d:
        raise ExperimentError(f"config: {projection} needs either a budget or d, got budget={budget} and d={d}.")
    if budget is None:
        return {"r": r, "d": d, "budget": None, "hyperparameters": given}
    family = tasks.get(settings["task"], settings.get("data", HUB)).family
    shapes = adapted_shapes(family, settings["model"], settings.get("target_modules"))
    fitted = get(projection).for_budget(shapes, budget, r)
    return {"r": fitted.r, "d": fitted.d, "budget": budget, "hyperparameters": {**given, **fitted.hyperparameters}}


def _check(config: RunConfig) -> None:
    positive = ("r", "epochs", "batch_size", "accumulation", "max_length", "max_new_tokens", "evaluations")
    for name in (*positive, "train_size", "validation_size", "test_size", "budget", "d"):
        value = getattr(config, name)
        if value is None and name not in positive:
            continue
        if not value > 0:
            raise ExperimentError(f"config: {name} must be positive, got {value}. Correct the setting.")
    if not 0.0 <= config.label_noise <= 1.0:
        raise ExperimentError(f"config: label_noise must lie in [0, 1], got {config.label_noise}.")
    if config.score_on not in ("validation", "test"):
        raise ExperimentError(f"config: score_on must be validation or test, got {config.score_on!r}.")
