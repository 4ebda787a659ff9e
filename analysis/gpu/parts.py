"""What is asked of a GPU, the most important first: parts with a share of the time, and their measurements in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from analysis.bank.models import TARGETS
from analysis.overhead import kernel, model
from analysis.overhead.workloads import DEFAULT, WORKLOADS
from experiments.timing import LEAST_VALUES

_TINY = "tiny"
# of the model part: fewer than `analysis.overhead` takes, so that more methods fit
_PAIRS, _NEW_TOKENS = 8, 8
# of theta_d, as in results/bank
_USERS, _MIXED_D = (16, 256), 23_040
TESTS = ("test_numbers", "test_waiting", "test_operators", "test_compiling", "test_models", "test_two_devices")


@dataclass(frozen=True)
class Part:
    """Measurements of one kind; share: of all the time."""

    name: str
    share: float
    jobs: Sequence[dict[str, Any]]


def parts(device: str, tiny: bool) -> list[Part]:
    """All of them, on small models and with few methods where `tiny`."""
    suite = "tests/kernels/test_random.py" if tiny else "tests/kernels"
    return [
        Part("tests", 0.2, [_tests(f"tests/gpu/{name}.py") for name in TESTS]),
        Part("kernel", 0.2, kernel.jobs([_small_case()] if tiny else None)),
        Part("model", 0.38, _models((_TINY,) if tiny else DEFAULT[device], device, tiny)),
        Part("mixed", 0.14, _mixed(_TINY, (2, 3)) if tiny else _mixed(DEFAULT[device][0], _USERS)),
        Part("suite", 0.08, [_tests(suite, keyword=device)]),
    ]


def _small_case() -> kernel.Case:
    return kernel.Case(_TINY, 4, 128, LEAST_VALUES)


def _tests(paths: str, keyword: str = "") -> dict[str, Any]:
    """keyword: pytest's -k."""
    return {"part": "tests", "package": "analysis.gpu", "paths": paths, "keyword": keyword}


def _models(bases: Sequence[str], device: str, tiny: bool) -> list[dict[str, Any]]:
    """Of every base first PEFT's methods, each behind uniproj's of the same name, and then uniproj's others."""
    peers = [name for peer in model.PEFT for name in (peer.removeprefix("PEFT ").lower(), peer)][1:]
    others = [] if tiny else [name for name in model.names() if name not in peers]
    order = [(base, name) for names in (peers, others) for base in bases for name in names]
    smaller = {
        "pairs": _PAIRS,
        "pairs_checkpointing": LEAST_VALUES,
        "pairs_inference": _PAIRS,
        "new_tokens": _NEW_TOKENS,
    }
    return [{**job, **smaller} for base, name in order for job in model.jobs([base], [name], device)]


def _mixed(base: str, users: Sequence[int]) -> list[dict[str, Any]]:
    common = {"part": "mixed", "package": "analysis.gpu", "base": base, "d": min(_MIXED_D, WORKLOADS[base].d)}
    return [
        {**common, "targets": targets, "users": count, "new_tokens": _NEW_TOKENS, "rounds": LEAST_VALUES}
        for targets in reversed(TARGETS)
        for count in users
    ]
