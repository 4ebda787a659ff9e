"""One verdict per projection: isometric, isometric in expectation, or not, each with the number that decides it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from analysis.command import bar
from analysis.isometry import isolated
from analysis.isometry.measure import deviation, expectation
from analysis.spaces import Entry, build, layout
from uniproj import Projection

ISOMETRIC, IN_EXPECTATION, NOT, UNDECIDED = "isometric", "in expectation", "not", "not measured"
# Entries of a dense P beyond which each projection has a process of its own, with a limit on its time.
MOST_TOGETHER = 2**31


def verdicts(
    chosen: Sequence[tuple[str, Mapping[str, Any]]],
    space: str,
    rank: int,
    d: int,
    seed: int = 0,
    plugins: Sequence[str] = (),
) -> pd.DataFrame:
    """A row per projection and choice of hyperparameters on a named layout (`analysis.spaces.layout`).

    verdict and number: max|P^T P - I| (rms beyond d = 4096) for "isometric" and "not", the mean of ||P v||^2 over
    seeds for "in expectation"; what: which of them. The other columns are those of `measure.Deviation`.
    """
    together = layout(space, rank).D * d <= MOST_TOGETHER
    rows = []
    for name, variant in bar(chosen, "isometry"):
        if together:
            rows.append(row(build(name, variant, layout(space, rank), d, seed)))
        else:
            rows.append(isolated.run(name, variant, space, rank, d, seed, plugins))
    return pd.DataFrame(rows)


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
