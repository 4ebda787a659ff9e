"""What a finished run says of itself, and whether that can be true."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from experiments.checks import check_record
from experiments.errors import ExperimentError
from experiments.runs import RunConfig
from experiments.tasks import RANGES, is_score


@dataclass(frozen=True)
class _Cost:
    """What a run took."""

    seconds: float
    train_seconds: float = 0.0
    peak_bytes: int = 0
    processes: int = 1


@dataclass(frozen=True)
class _Origin:
    """Where and when it was trained."""

    versions: Mapping[str, str]
    commit: str | None
    hardware: Mapping[str, Any]
    finished: str


@dataclass(frozen=True)
class _Best:
    """The scores of the best checkpoint."""

    score: float | None
    scores: Mapping[str, float | None]


@dataclass(frozen=True)
class _Record:
    """Of result.json, what readers count with; fields with a default came later, or are not of every run."""

    config: RunConfig
    metric: str
    score: float | None
    did_not_train: str | None
    validation: float | None = None
    validation_best: float | None = None
    selection: str = "score"
    higher_is_better: bool = True
    scores: Mapping[str, float | None] | None = None
    groups: Mapping[str, float | None] | None = None
    best: _Best | None = None
    majority: float | None = None
    rows: int | None = None
    step: int | None = None
    D: int | None = None
    trained: int | None = None
    budget_error: float | None = None
    head: int | None = None
    adapter_bytes: int | None = None
    head_bytes: int | None = None
    resident_bytes: int | None = None
    index_bytes: int | None = None
    isometry_error: float | None = None
    step_ratio: float | None = None
    step_ratio_low: float | None = None
    step_ratio_high: float | None = None
    adapter_sha256: str | None = None
    cost: _Cost | None = None
    provenance: _Origin | None = None


def check(result: Mapping[str, Any]) -> None:
    """Raises ExperimentError for a value of another type than its field's, or a score that its metric cannot have."""
    check_record("", _Record, result)
    metric = result["metric"]
    if metric not in RANGES:
        raise ExperimentError(f"metric must be one of {', '.join(RANGES)}, got {metric!r}.")
    for name, of, score in _scores(result):
        if score is not None and of in RANGES and not is_score(of, score):
            low, high = RANGES[of]
            raise ExperimentError(f"{name} of {of} must lie in [{low:g}, {high:g}], got {score}.")


def _scores(result: Mapping[str, Any]) -> Iterator[tuple[str, str, float | None]]:
    """(name, metric, score) of all that a result holds."""
    metric, best = result["metric"], result.get("best") or {}
    watched = ("validation", "validation_best") if result.get("selection", "score") == "score" else ()
    # a trial is scored by what is watched, which may be a loss
    tested = ("score", "majority") if result["config"].get("score_on", "test") == "test" else ()
    for name in (*tested, *watched):
        yield name, metric, result.get(name)
    for group, score in (result.get("groups") or {}).items():
        yield f"groups.{group}", metric, score
    for where, scores in (("scores", result.get("scores")), ("best.scores", best.get("scores"))):
        for of, score in (scores or {}).items():
            yield f"{where}.{of}", of, score
    yield "best.score", metric, best.get("score")
