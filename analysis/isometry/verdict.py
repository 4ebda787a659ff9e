"""One verdict per projection: isometric, isometric in expectation, or not, each with the number that decides it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from analysis.isometry.measure import deviation, expectation
from analysis.spaces import Entry
from uniproj import Projection

ISOMETRIC, IN_EXPECTATION, NOT, UNDECIDED = "isometric", "in expectation", "not", "not measured"


def row(entry: Entry) -> dict[str, Any]:
    """The verdict on one projection; one that cannot be built on this layout, or fails, has only a note."""
    entry, found = entry.attempt(_decided)
    return {**entry.row(), **(found or {"verdict": UNDECIDED})}


def _decided(P: Projection) -> dict[str, Any]:
    found = deviation(P)
    is_exact = found.method == "exact"
    number = found.max_error if is_exact else found.rms
    verdict, what = NOT, "max|P^T P - I|" if is_exact else "||P^T P - I||_F / sqrt(d)"
    if found.is_isometric:
        verdict = ISOMETRIC
    else:
        over_seeds = expectation(P)
        if over_seeds.holds:
            verdict, number, what = IN_EXPECTATION, over_seeds.gain, "mean of ||P v||^2 over seeds"
    return {"verdict": verdict, "number": number, "what": what, **asdict(found)}
