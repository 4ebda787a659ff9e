"""uniproj's own projections as methods."""

from __future__ import annotations

from typing import Any

import uniproj
from analysis.overhead.banks import bank
from analysis.overhead.problem import Candidate, Method, Problem, backward
from uniproj import Projection


def build(problem: Problem, name: str) -> Projection:
    """The projection on the layout and the device of a problem; a d that the method decides itself is left out."""
    cls = uniproj.get(name)
    hyperparameters: dict[str, Any] = bank(problem.layout) if name == "vblora" else {}
    if cls.needs_base_weights:
        hyperparameters["base_weights"] = problem.base_weights
    d = problem.d if cls.free_d else None
    return uniproj.build(name, layout=problem.layout, d=d, **hyperparameters).to(problem.device)


def as_method(P: Projection, problem: Problem) -> Method:
    """theta_D = P theta_d + c and autograd back into theta_d and P's Parameters: what a training step calls."""
    trained = [P.init_theta().to(problem.device).requires_grad_(), *P.parameters()]
    return Method(lambda: P(trained[0]), lambda theta_D: backward([theta_D], trained, [problem.y]), trained)


def candidate(name: str, peak: float) -> Candidate:
    """A projection of uniproj as a candidate under its own name."""
    return Candidate(name, lambda problem: as_method(build(problem, name), problem), peak)
