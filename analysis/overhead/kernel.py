"""The kernel part: forward and adjoint of P beside PEFT's code, PyTorch's operators, and a memory copy.

One measurement is one family of methods on one case. Its methods take turns in the same process; every ratio is a
median of ratios within one turn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from analysis.overhead import methods
from analysis.overhead.methods import CLONE, COPY, FLOORS, candidate
from analysis.overhead.problem import SLOW, Candidate, Entrant, Problem, TooLarge, enter
from analysis.overhead.shapes import (
    LLAMA_2_7B,
    LLAMA_31_8B,
    TINY,
    minilm_query_value,
    roberta_large_query_value,
    sub_vectors,
)
from experiments.timing import interleave, ratio
from uniproj import LoRALayout, kernels

WARM_UP = 1
ARCHITECTURES = {
    "MiniLM q,v": minilm_query_value,
    "RoBERTa-large q,v": roberta_large_query_value,
    "Llama-2-7B": LLAMA_2_7B.all_linear,
    "Llama-3.1-8B": LLAMA_31_8B.all_linear,
    "tiny": TINY.all_linear,
}
# The first of a family is uniproj's, which the others are compared with. The figures are bytes per coordinate that
# building and calling it may take.
FAMILIES: dict[str, tuple[Candidate, ...]] = {
    "unilora": (candidate("unilora", 48), methods.PEFT_UNILORA, *methods.PEERS),
    "fastfood": (candidate("fastfood", 64), methods.BUTTERFLY),
    "vblora": (candidate("vblora", 48), methods.PEFT_VBLORA),
}


@dataclass(frozen=True)
class Case:
    """All modules of an architecture at one rank, the d of Uni-LoRA and Fastfood, and the number of turns."""

    architecture: str
    r: int
    d: int
    rounds: int


CASES = (
    Case("MiniLM q,v", 1, 1_000, 31),
    Case("MiniLM q,v", 4, 4_740, 31),
    Case("RoBERTa-large q,v", 4, 23_040, 15),
    Case("RoBERTa-large q,v", 8, 23_040, 15),
    Case("Llama-2-7B", 4, 524_288, 9),
    Case("Llama-2-7B", 16, 524_288, 6),
    Case("Llama-3.1-8B", 64, 1_048_576, 6),
)


def jobs(cases: Sequence[Case] | None = None) -> list[dict[str, Any]]:
    """The configuration of every measurement of this part, on these cases or on all."""
    return [{"part": "kernel", "family": family, **asdict(case)} for case in cases or CASES for family in FAMILIES]


def measure(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per method of the family, the floors first; a method that cannot be measured says why in `note`."""
    device = torch.device(config["device"])
    layout = LoRALayout.from_shapes(ARCHITECTURES[config["architecture"]](), config["r"])
    # VB-LoRA's d is the count of numbers in its sub-vectors
    d = math.prod(sub_vectors(layout).values()) if config["family"] == "vblora" else config["d"]
    problem = Problem(layout, d, device)
    family = FAMILIES[config["family"]]
    if config["family"] == "fastfood" and device.type == "cuda":
        family = (*family, methods.PACKAGE)
    if config["family"] == "unilora":
        problem.draw("index", "scale")
    entrants, rows = [], {}
    for entry in (*FLOORS, *family):
        try:
            entrants.append(enter(entry, problem))
            built = {} if entry in FLOORS else _built(entrants[-1], problem)
            rows[entry.name] = {"method": entry.name, "note": "", **built}
        except Exception as error:  # somebody else's code: the other methods are still worth measuring
            rows[entry.name] = {"method": entry.name, "note": reason(error)}
    racing = [entrant for entrant in entrants if not entrant.is_slow]
    times: np.ndarray = np.array(interleave([entrant.run for entrant in racing], config["rounds"], WARM_UP))
    seconds = {entrant.name: times[:, i] for i, entrant in enumerate(racing)}
    own = family[0].name
    for entrant in entrants:
        rows[entrant.name] |= _timed(entrant, seconds, own)
    if device.type == "cuda":
        for name, found in _timed_on_gpu(racing, config["rounds"]).items():
            rows[name] |= found
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
    trained = sum(tensor.numel() for tensor in entrant.method.parameters)
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
        return timed | ratio("both_per_copy", mine[:, 0], copied)
    both = mine.sum(1)
    timed |= ratio("forward_per_copy", mine[:, 0], copied)
    timed |= {"adjoint_seconds": float(np.median(mine[:, 1])), "both_seconds": float(np.median(both))}
    timed |= ratio("adjoint_per_copy", mine[:, 1], copied) | ratio("both_per_copy", both, copied)
    timed |= ratio("both_per_clone", both, seconds[CLONE][:, 0])
    if entrant.name != own and own in seconds:
        timed |= ratio("both_per_ours", both, seconds[own].sum(1))
    return timed


def _timed_on_gpu(racing: Sequence[Entrant], rounds: int) -> dict[str, dict[str, float]]:
    """Of every method the medians in s and the ratios to the copy, both of the GPU alone."""
    times: np.ndarray = np.array(interleave([entrant.run_on_gpu for entrant in racing], rounds, WARM_UP))
    copied = times[:, [entrant.name for entrant in racing].index(COPY), 0]
    found = {}
    for i, entrant in enumerate(racing):
        timed = {}
        for k, way in enumerate(("forward", "adjoint")[: 1 if entrant.name in (COPY, CLONE) else 2]):
            timed[f"gpu_{way}_seconds"] = float(np.median(times[:, i, k]))
            timed |= ratio(f"gpu_{way}_per_copy", times[:, i, k], copied)
        found[entrant.name] = timed
    return found
