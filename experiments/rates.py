"""Learning rates: the committed table, and what a record of tuning says is best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from experiments.errors import ExperimentError
from experiments.files import write_text

TABLE = Path(__file__).with_name("rates.yaml")
# the settings of the committed rates
TUNED: Mapping[str, Any] = {
    "model": "minilm", "task": "vader", "budget": 4740, "train_size": 1600, "epochs": 2, "r": 4,
}  # fmt: skip
TUNED_ON = f"{TUNED['model']} on {TUNED['task']}"
_HEADER = (
    "# Peak learning rate of theta_d by projection, each the best of its record on the validation split.\n"
    "# Written by `python -m experiments.tune` from tuning/*.json; not edited by hand.\n"
)


def best(trials: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The rate with the best validation score of each projection that trained; ties go to the lower rate."""
    chosen: dict[str, Mapping[str, Any]] = {}
    for trial in sorted(trials, key=lambda t: t["lr"]):
        known = chosen.get(trial["projection"])
        if (
            not trial["did_not_train"]
            and trial["validation"] is not None
            and (known is None or trial["validation"] > known["validation"])
        ):
            chosen[trial["projection"]] = trial
    return {projection: chosen[projection]["lr"] for projection in sorted(chosen)}


def remark(settings: Mapping[str, Any]) -> str:
    """What a reader must know of the committed rates at other settings than their own; nothing at those."""
    other = {key: settings[key] for key, tuned in TUNED.items() if settings[key] != tuned}
    if not other:
        return ""
    return f"Learning rates were tuned at {_listed(TUNED)}, not at {_listed(other)}: --lr auto tunes them for these."


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def save(rates: Mapping[str, float]) -> None:
    """Replace the committed table."""
    write_text(TABLE, _HEADER + yaml.safe_dump({"tuned_on": TUNED_ON, "lr": dict(rates)}, sort_keys=False))


def load(projections: Iterable[str]) -> dict[str, float]:
    """The committed rates of these projections. Raises ExperimentError for one that was never tuned."""
    table = yaml.safe_load(TABLE.read_text())["lr"]
    if missing := [p for p in projections if p not in table]:
        raise ExperimentError(
            f"rates: every projection needs a tuned rate, got none for {', '.join(missing)}. "
            f"Known: {', '.join(table)}. Pass --lr auto to tune, or a number."
        )
    return {p: table[p] for p in projections}
