"""Learning rates from the validation split: `python -m experiments.tune` writes rates.yaml and the record of it.

Rates are tried at 1 and 3 times powers of ten. A projection whose best rate lies at the edge of what was tried
gets one more rate beyond it, until the best lies inside. The test split is never read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments import rates
from experiments.errors import ExperimentError
from experiments.files import write_json
from experiments.records.reading import row
from experiments.runs.folder import RUNS, prepare
from experiments.runs.provenance import versions
from experiments.runs.resolve import COMPARED, resolve
from experiments.sweeps.workers import train_all
from uniproj import console

# rate(k): ..., -6: 1e-3, -5: 3e-3, -4: 1e-2, -3: 3e-2, ...
GRID = (-6, -5, -4, -3)
LOWEST, HIGHEST = -10, 2
RECORD = Path(__file__).with_name("tuning")
Trial = dict[str, Any]


def rate(k: int) -> float:
    """The k-th rate that is tried."""
    return float(f"{3 if k % 2 else 1}e{k // 2}")


def tune(settings: Mapping[str, Any], projections: Sequence[str], runs: Path) -> list[Trial]:
    """Every trial: its configuration, validation score, losses and whether it trained.

    Raises ExperimentError if a trial fails or a projection trained at no rate.
    """
    tried = {projection: list(GRID) for projection in projections}
    while True:
        folders = [
            prepare(runs, resolve({**settings, "projection": p, "lr": rate(k), "score_on": "validation"}).to_json())
            for p in projections
            for k in tried[p]
        ]
        if failures := train_all(folders, settings["device"]):
            folder, reason = next(iter(failures.items()))
            raise ExperimentError(f"tune: every trial must finish, got a failure in {folder}: {reason}")
        trials = [{k: v for k, v in row(f).items() if k not in ("folder", "provenance")} for f in folders]
        best = rates.best(trials)
        if stuck := set(projections) - set(best):
            raise ExperimentError(f"tune: {', '.join(sorted(stuck))} must train at some rate, got none. See {runs}.")
        grown = [_extend(tried[p], best[p]) for p in projections]
        if not any(grown):
            return trials


def _extend(tried: list[int], best: float) -> bool:
    """Add the rate beyond the edge on which the best lies; False if it lies inside or at a limit."""
    edge = {rate(min(tried)): min(tried) - 1, rate(max(tried)): max(tried) + 1}.get(best)
    if edge is None or not LOWEST <= edge <= HIGHEST:
        return False
    tried.append(edge)
    return True


def record(trials: Sequence[Trial]) -> dict[str, Any]:
    """What a reader needs to repeat the tuning: the common settings once, then each trial's own."""
    shared = {key: value for key, value in trials[0].items() if all(t.get(key) == value for t in trials)}
    return {
        "rule": "highest validation score per projection; ties to the lower rate; the test split was not read",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "common": shared,
        "best": rates.best(trials),
        "trials": [{key: value for key, value in trial.items() if key not in shared} for trial in trials],
    }


def describe(best: Mapping[str, float]) -> str:
    """One line per projection."""
    return "\n".join(f"  {projection:22s} {lr:g}" for projection, lr in best.items())


@console.command
def main(argv: list[str] | None = None) -> int:
    """Tune the default comparison and replace the committed table and its record: 0 done, 2 a trial failed."""
    argparse.ArgumentParser(prog="python -m experiments.tune", description=__doc__).parse_args(argv)
    try:
        trials = tune({**rates.TUNED, "device": "cpu", "seed": 0}, COMPARED, RUNS)
    except ExperimentError as error:
        print(error, file=sys.stderr)
        return 2
    write_json(RECORD / "minilm-vader.json", record(trials))
    rates.save(rates.best(trials))
    print(describe(rates.best(trials)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
