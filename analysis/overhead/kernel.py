"""The kernel part: forward and adjoint of P beside PEFT's code, PyTorch's operators, and a memory copy.

One measurement is one family of methods on one case. Its methods take turns in the same process; every ratio is a
median of ratios within one turn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from analysis.overhead import fastfood, gathers, ours, peft_layers
from analysis.overhead.banks import bank
from analysis.overhead.entrants import SLOW, Entrant, TooLarge, enter
from analysis.overhead.gathers import CLONE, COPY
from analysis.overhead.problem import Candidate, Problem
from analysis.overhead.shapes import LLAMA_2_7B, LLAMA_31_8B, roberta_large_query_value
from experiments.timing import interleave, median_interval
from uniproj import LoRALayout, kernels

WARM_UP = 1
ARCHITECTURES = {
    "RoBERTa-large q,v": roberta_large_query_value,
    "Llama-2-7B": LLAMA_2_7B.all_linear,
    "Llama-3.1-8B": LLAMA_31_8B.all_linear,
}
# The first of a family is uniproj's, which the others are compared with. The figures are bytes per coordinate that
# building and calling it may take.
FAMILIES: dict[str, tuple[Candidate, ...]] = {
    "unilora": (ours.candidate("unilora", 48), peft_layers.UNILORA, *gathers.PEERS),
    "fastfood": (ours.candidate("fastfood", 64), fastfood.BUTTERFLY),
    "vblora": (ours.candidate("vblora", 48), peft_layers.VBLORA),
}


@dataclass(frozen=True)
class Case:
    """All modules of an architecture at one rank, the d of Uni-LoRA and Fastfood, and the number of turns."""

    architecture: str
    r: int
    d: int
    rounds: int


CASES = (
    Case("RoBERTa-large q,v", 4, 23_040, 15),
    Case("RoBERTa-large q,v", 8, 23_040, 15),
    Case("Llama-2-7B", 4, 524_288, 9),
    Case("Llama-2-7B", 16, 524_288, 6),
    Case("Llama-3.1-8B", 64, 1_048_576, 6),
)


def jobs() -> list[dict[str, Any]]:
    """The configuration of every measurement of this part."""
    return [{"part": "kernel", "family": family, **asdict(case)} for case in CASES for family in FAMILIES]


def measure(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per method of the family, the floors first; a method that cannot be measured says why in `note`."""
    device = torch.device(config["device"])
    layout = LoRALayout.from_shapes(ARCHITECTURES[config["architecture"]](), config["r"])
    # VB-LoRA's d is the size of its bank
    d = math.prod(bank(layout).values()) if config["family"] == "vblora" else config["d"]
    problem = Problem(layout, d, device)
    family = FAMILIES[config["family"]]
    if config["family"] == "fastfood" and device.type == "cuda":
        family = (*family, fastfood.PACKAGE)
    if config["family"] == "unilora":
        problem.draw_partition()
    entrants, rows = [], {}
    for candidate in (*gathers.FLOORS, *family):
        try:
            entrants.append(enter(candidate, problem))
            built = {} if candidate in gathers.FLOORS else _built(entrants[-1], problem)
            rows[candidate.name] = {"method": candidate.name, "note": "", **built}
        except Exception as error:  # somebody else's code: the other methods are still worth measuring
            rows[candidate.name] = {"method": candidate.name, "note": reason(error)}
    racing = [entrant for entrant in entrants if not entrant.is_slow]
    times: np.ndarray = np.array(interleave([entrant.run for entrant in racing], config["rounds"], WARM_UP))
    seconds = {entrant.name: times[:, i] for i, entrant in enumerate(racing)}
    own = family[0].name
    for entrant in entrants:
        rows[entrant.name] |= _timed(entrant, seconds, own)
    rows[own]["backend"] = kernels.backend(device)
    common = {
        "case": f"{config['architecture']} r={config['r']}",
        "family": config["family"],
        "D": layout.D,
        "d": d,
        "modules": len(layout.modules),
        "rounds": config["rounds"],
    }
    return [{**common, "backend": "torch", **row} for row in rows.values()]


def reason(error: Exception) -> str:
    """The first line of an error: "skipped" for what is too large or not installed, else "failed" and its kind."""
    text = (str(error).strip().splitlines() or ["no message"])[0]
    skipped = isinstance(error, (TooLarge, ImportError))
    return f"skipped: {text}" if skipped else f"failed: {type(error).__name__}: {text}"


def _built(entrant: Entrant, problem: Problem) -> dict[str, Any]:
    trained = sum(tensor.numel() for tensor in entrant.method.trained)
    return {
        "trained": trained or problem.d,
        "bytes_per_coordinate": entrant.resident / problem.D,
        "build_seconds": entrant.build_seconds,
    }


def _timed(entrant: Entrant, seconds: Mapping[str, np.ndarray], own: str) -> dict[str, Any]:
    """Medians in s, ratios to the floors, and for peers the ratio to uniproj's method, from the turns of all."""
    if entrant.is_slow:
        forward, adjoint = entrant.first
        note = f"one call only: beyond {SLOW:g} s, not taken in turn"
        return {"forward_seconds": forward, "adjoint_seconds": adjoint, "both_seconds": forward + adjoint, "note": note}
    mine, copied = seconds[entrant.name], seconds[COPY][:, 0]
    timed = {"forward_seconds": float(np.median(mine[:, 0]))}
    if entrant.name == COPY:
        return timed
    if entrant.name == CLONE:
        return timed | _ratio("both_per_copy", mine[:, 0], copied)
    both = mine.sum(1)
    timed |= _ratio("forward_per_copy", mine[:, 0], copied)
    timed |= {"adjoint_seconds": float(np.median(mine[:, 1])), "both_seconds": float(np.median(both))}
    timed |= _ratio("adjoint_per_copy", mine[:, 1], copied) | _ratio("both_per_copy", both, copied)
    timed |= _ratio("both_per_clone", both, seconds[CLONE][:, 0])
    if entrant.name != own and own in seconds:
        timed |= _ratio("both_per_ours", both, seconds[own].sum(1))
    return timed


def _ratio(name: str, above: np.ndarray, below: np.ndarray) -> dict[str, float]:
    """The median of paired ratios as `name`, with the bounds of its 95 % interval."""
    ratio, low, high = median_interval(above / below)
    return {name: ratio, f"{name}_low": low, f"{name}_high": high}
