"""The verdicts on many projections, each in a process of its own where P is large."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from analysis.command import bar
from analysis.isometry import isolated
from analysis.isometry.measure import verdict
from analysis.spaces import Choice, build, layout

# Entries of a dense P beyond which each projection has a process of its own, with a limit on its time.
_MOST_TOGETHER = 2**31


def verdicts(
    chosen: Sequence[Choice],
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
    together = layout(space, rank).D * d <= _MOST_TOGETHER
    rows = []
    for name, variant in bar(chosen, "isometry"):
        if together:
            rows.append(verdict(build(name, variant, layout(space, rank), d, seed)))
        else:
            rows.append(isolated.run(name, variant, space, rank, d, seed, plugins))
    return pd.DataFrame(rows)
