"""What a finished run says: scores of the last and the best checkpoint, sizes, whether it trained at all."""

from __future__ import annotations

import math
import resource
from pathlib import Path
from typing import Any

import torch

from experiments.files import sha256, write_text
from experiments.runs import entrants
from experiments.runs.run import Run, watched
from experiments.runs.step_time import step_times
from uniproj.claims import isometry_error

# Fraction of the initial loss that a run must gain on rows it was trained on.
LEAST_GAIN = 0.01
ADAPTER = "adapter"
# A dense P costs 2 D d^2 flop to check; beyond this many entries the error is left out.
_CHECKED_ENTRIES = 2**28


def evaluate(run: Run, before: float) -> dict[str, Any]:
    """Everything a trained run is asked; the test split is read only where the configuration says so.

    One that diverged has no score, and nothing of it is kept.
    """
    after, change, diverged = run.probe(), _largest_change(run), run.divergence.reason
    scored = _unscored(run) if diverged else _scored(run)
    saved = None if diverged else _saved(run)
    return {
        "config": run.config.to_json(),
        "metric": run.task.metric,
        "classes": list(run.task.classes) or None,
        **scored,
        "loss_before": _finite(before),
        "loss_after": _finite(after),
        "did_not_train": diverged or did_not_train(before, after, change),
        "theta_change": _finite(change),
        **_sizes(run, saved, bool(diverged)),
        "adapter_sha256": saved and sha256(saved),
        "incomplete_data": _data_rows(run),
        **(_timed(run) if run.config.timing and not diverged else {}),
    }


def _scored(run: Run) -> dict[str, Any]:
    validation = _validations(run)
    on_test = run.config.score_on == "test"
    return {**(_tested(run) if on_test else {"score": validation["validation"]}), **validation}


def _saved(run: Run) -> Path | None:
    """The file of what was trained, which the first process writes; None where it is not kept."""
    file = None
    run.trainer.accelerator.wait_for_everyone()
    if run.trainer.is_world_process_zero():
        file = run.entrant.save(run.model, run.folder / ADAPTER, run.config)
    run.trainer.accelerator.wait_for_everyone()
    return file


def _validations(run: Run) -> dict[str, Any]:
    """The validation score of the last step and of the best one, by the family's selection."""
    key, state = run.family.selection, run.trainer.state
    last = next(line[key] for line in reversed(state.log_history) if key in line)
    best_step = state.best_global_step or state.global_step
    return {
        "selection": key.removeprefix("eval_"),
        "higher_is_better": run.family.higher_is_better,
        "validation": _finite(last),
        "validation_best": _finite(last if state.best_metric is None else state.best_metric),
        "step": state.global_step,
        "best_step": best_step,
    }


def _tested(run: Run) -> dict[str, Any]:
    """Scores on the test split of the last checkpoint and of the best; the predictions go to CSV files."""
    last = _scores(run, "last")
    best_step = run.trainer.state.best_global_step
    if best_step in (None, run.trainer.state.global_step):
        best = last
    else:
        kept = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}
        run.entrant.load(run.model, run.folder / f"checkpoint-{best_step}")
        best = _scores(run, "best")
        run.model.load_state_dict(kept, strict=False)
    return {**last, "best": {key: best[key] for key in ("score", "scores")}}


def _scores(run: Run, which: str) -> dict[str, Any]:
    rows = run.test_rows()
    predictions = run.family.predict(run.trainer, rows)
    if run.trainer.is_world_process_zero():
        write_text(run.folder / f"predictions-{which}.csv", predictions.to_csv(index=False))
    scores = {metric: _finite(value) for metric, value in run.task.scores(predictions).items()}
    if run.task.family == "causal" and rows["completion"].str.len().gt(0).all():
        scores["loss"] = _finite(run.loss(run.family.encode(rows)))
    groups = predictions.groupby("group") if "group" in predictions else ()
    return {
        "score": scores[run.task.metric],
        "scores": scores,
        "groups": {name: _finite(run.task.score(part.drop(columns="group"))) for name, part in groups},
        "majority": _finite(run.task.majority(predictions)),
        "rows": len(predictions),
    }


def _unscored(run: Run) -> dict[str, Any]:
    """What `_tested` and `_validations` say of a run that diverged: what is known without a prediction."""
    absent: dict[str, Any] = {"score": None}
    if run.config.score_on == "test":
        rows = run.test_rows()
        absent |= {"scores": {}, "groups": {}, "majority": _finite(run.task.majority(rows)), "rows": len(rows)}
        absent |= {"best": None}
    return {
        **absent,
        "selection": run.family.selection.removeprefix("eval_"),
        "higher_is_better": run.family.higher_is_better,
        "validation": None,
        "validation_best": None,
        "step": run.trainer.state.global_step,
        "best_step": None,
    }


def _largest_change(run: Run) -> float:
    """Largest change since the start of what the entrant trains, as far as that is kept."""
    now = watched(run.model, run.family)
    return max((float((now[name] - start).abs().max()) for name, start in run.start.items()), default=0.0)


def did_not_train(before: float, after: float, change: float) -> str | None:
    """Why a run must not be ranked, or None: the loss did not fall by 1 %, or what is trained stayed where it was."""
    if not math.isfinite(after):
        return f"the loss went from {before:.3f} to {after}"
    if not change > 0:
        return "no trained number changed"
    if after > (1 - LEAST_GAIN) * before:
        return f"the loss went from {before:.3f} to {after:.3f}"
    return None


def _sizes(run: Run, saved: Path | None, diverged: bool) -> dict[str, Any]:
    """Numbers trained; bytes stored (the file), resident (what is held besides), and those of them that are indices.

    saved: the file of what was trained; where it is not kept, its bytes are those of the numbers.
    """
    own, head = (list(part.values()) for part in entrants.parts(run.model, run.family.heads))
    trained, budget = sum(p.numel() for p in own), run.config.budget
    head_bytes, P = sum(p.nbytes for p in head), run.entrant.projection(run.model)
    stored = sum(p.nbytes for p in own) if saved is None else saved.stat().st_size - head_bytes
    held = {t.data_ptr(): t for t in run.entrant.held(run.model)}.values()
    return {
        "D": None if P is None else P.D,
        "trained": trained,
        "budget_error": None if budget is None else trained / budget - 1.0,
        "head": sum(p.numel() for p in head),
        "adapter_bytes": None if diverged else stored,
        "head_bytes": head_bytes,
        "resident_bytes": sum(t.nbytes for t in held),
        "index_bytes": sum(t.nbytes for t in held if not t.is_floating_point()),
    }


def _timed(run: Run) -> dict[str, Any]:
    """max|P^T P - I| of the P that was trained, where it is cheap to know, and the times of training steps."""
    P = run.entrant.projection(run.model)
    error = None
    if P is not None and (P.sparse or P.D * P.d <= _CHECKED_ENTRIES):
        error = isometry_error(P)
    return {"isometry_error": error, **step_times(run)}


def peak_bytes(device: str) -> int:
    """The most memory this process had: of the accelerator, or resident on the CPU (ru_maxrss, kB on Linux)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _finite(value: float) -> float | None:
    """The number, or None in place of NaN and infinity, which JSON does not have."""
    return float(value) if math.isfinite(value) else None


def _data_rows(run: Run) -> dict[str, dict[str, int]]:
    """Rows at hand against those published, for splits where they differ: scores are then not comparable."""
    published, found = run.task.published, {}
    for name, splits in {"test": ("test",), "train": ("train", "validation")}.items():
        if name in published and (name != "test" or run.config.score_on == "test"):
            rows = sum(len(run.task.split(split)) for split in splits)
            if rows != published[name]:
                found[name] = {"rows": rows, "published": published[name]}
    return found
