"""What a finished run says: scores of the last and the best checkpoint, sizes, whether it trained at all."""

from __future__ import annotations

import hashlib
import math
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import load_peft_weights, set_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor

from experiments.files import write_text
from experiments.runs.run import HEAD, Run
from experiments.runs.step_time import step_times
from uniproj.claims import isometry_error
from uniproj.format import HEADS
from uniproj.projection import Projection
from uniproj.tuner import adapter_of

# Fraction of the initial loss that a run must gain on rows it was trained on.
LEAST_GAIN = 0.01
ADAPTER = "adapter"
# A dense P costs 2 D d^2 flop to check; beyond this many entries the error is left out.
_CHECKED_ENTRIES = 2**28


def evaluate(run: Run, before: float) -> dict[str, Any]:
    """Everything a trained run is asked; the test split is read only where the configuration says so.

    One that diverged has no score and no adapter.
    """
    after, change, diverged = run.probe(), _theta_change(run), run.divergence.reason
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
        **_sizes(run, saved),
        "adapter_sha256": saved and hashlib.sha256(saved.read_bytes()).hexdigest(),
        "incomplete_data": _data_rows(run),
        **(_timed(run) if run.config.timing and not diverged else {}),
    }


def _scored(run: Run) -> dict[str, Any]:
    validation = _validations(run)
    on_test = run.config.score_on == "test"
    return {**(_tested(run) if on_test else {"score": validation["validation"]}), **validation}


def _saved(run: Run) -> Path:
    """The file of the adapter, which the first process writes."""
    run.trainer.accelerator.wait_for_everyone()
    if run.trainer.is_world_process_zero():
        run.model.save_pretrained(run.folder / ADAPTER)
    run.trainer.accelerator.wait_for_everyone()
    return run.folder / ADAPTER / "adapter_model.safetensors"


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
        checkpoint = run.folder / f"checkpoint-{best_step}"
        set_peft_model_state_dict(run.model, load_peft_weights(str(checkpoint), device="cpu"))
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


def _theta_change(run: Run) -> float:
    """Largest change of an entry of theta_d since the start."""
    theta_d = adapter_of(run.model).theta_d.detach().cpu()
    return float((theta_d - run.projection.init_theta(run.config.init_seed).cpu()).abs().max())


def did_not_train(before: float, after: float, change: float) -> str | None:
    """Why a run must not be ranked, or None: the loss did not fall by 1 %, or theta_d stayed where it was."""
    if not math.isfinite(after):
        return f"the loss went from {before:.3f} to {after}"
    if not change > 0:
        return "theta_d did not change"
    if after > (1 - LEAST_GAIN) * before:
        return f"the loss went from {before:.3f} to {after:.3f}"
    return None


def _sizes(run: Run, saved: Path | None) -> dict[str, Any]:
    """Numbers trained; bytes stored (the file), resident (what P holds besides), and those of them that are indices.

    saved: the file of the adapter, None where there is none.
    """
    P, budget = run.projection, run.config.budget
    heads = [p for name, p in run.model.named_parameters() if p.requires_grad and HEAD in name]
    head_bytes, adapter_bytes = sum(p.nbytes for p in heads), None
    if saved is not None:
        with safe_open(saved, "pt") as tensors:
            head_bytes = sum(tensors.get_tensor(k).nbytes for k in tensors.keys() if k.startswith(HEADS))  # noqa: SIM118
        adapter_bytes = saved.stat().st_size - head_bytes
    held = {t.data_ptr(): t for t in _held_tensors(P)}.values()
    return {
        "D": P.D,
        "trained": P.trained,
        "budget_error": None if budget is None else P.trained / budget - 1.0,
        "head": sum(p.numel() for p in heads),
        "adapter_bytes": adapter_bytes,
        "head_bytes": head_bytes,
        "resident_bytes": sum(t.nbytes for t in held),
        "index_bytes": sum(t.nbytes for t in held if not t.is_floating_point()),
    }


def _held_tensors(P: Projection) -> Iterator[Tensor]:
    """Every tensor that P keeps besides what is trained: buffers, caches, tables of its parts."""
    seen: set[int] = set()
    waiting: list[Any] = [P]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, torch.nn.Parameter):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        elif type(value).__module__.startswith("uniproj") or type(value).__module__ == P.__class__.__module__:
            waiting += [getattr(value, name) for name in getattr(type(value), "__slots__", ())]
            waiting += vars(value).values() if hasattr(value, "__dict__") else ()


def _timed(run: Run) -> dict[str, Any]:
    """max|P^T P - I| of the P that was trained, where it is cheap to know, and the times of training steps."""
    P = run.projection
    cheap = P.sparse or P.D * P.d <= _CHECKED_ENTRIES
    return {"isometry_error": isometry_error(P) if cheap else None, **step_times(run)}


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
