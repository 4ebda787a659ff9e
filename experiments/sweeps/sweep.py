"""A sweep as a file: which runs it asks for. Hydra composes the file and the overrides."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.checks import check_distinct, check_fields, check_type
from experiments.errors import ExperimentError
from experiments.runs import SEEDS, RunConfig, entrants, resolve

Cell = dict[str, Any]
# what the sweep itself gives to each run
OWN = {"seed", "score_on"}


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says.

    settings: fields of RunConfig that all runs share. cases: settings of which each run has one; axes: settings with a
    list of values, all of which are crossed. A projection may be any entrant, written as `name` or `{name: options}`.
    tune: `seeds` and the settings to choose among on the validation split; seeds: those of the runs that are reported,
    none of them used for tuning. published: scores others reported, by task. launcher: options of the launchers, by
    name. most_runs: a sweep that asks for more is refused before they are worked out.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    cases: Sequence[Mapping[str, Any]] = ({},)
    tune: Mapping[str, Sequence[Any]] | None = None
    seeds: Sequence[int] = (0,)
    published: Mapping[str, Any] = field(default_factory=dict)
    launcher: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    most_runs: int = 10_000

    def __post_init__(self) -> None:
        sweep = f"sweep {self.name}: "
        check_fields(sweep, Sweep, vars(self))
        # the name is that of a folder
        if self.name != Path(self.name).name or self.name in ("", "..") or not self.name.isprintable():
            raise ExperimentError(
                f"{sweep}name must be that of one folder, got {self.name!r}. Leave slashes and control characters out."
            )
        if self.size > self.most_runs:
            raise ExperimentError(
                f"{sweep}the crossed axes, cases and seeds must ask for at most {self.most_runs:,} runs, got "
                f"{self.size:,}. Shorten an axis, or raise most_runs in the file."
            )
        for what in ("cases", "seeds"):
            check_distinct(sweep + what, getattr(self, what))
        for what in ("axes", "tune"):
            for key, values in (getattr(self, what) or {}).items():
                check_distinct(f"{sweep}{what}.{key}", values)
        if self.tune is not None:
            self._check_tune(self.tune)
        self._check_places()

    def _check_tune(self, tune: Mapping[str, Sequence[Any]]) -> None:
        if "seeds" not in tune or len(tune) < 2:
            raise ExperimentError(
                f"sweep {self.name}: tune needs `seeds` and at least one setting with a list of values, such as "
                f"lr: [1e-3, 1e-2], got {dict(tune)}."
            )
        check_type(f"sweep {self.name}: tune.seeds", tune["seeds"], Sequence[int])
        if shared := set(tune["seeds"]) & set(self.seeds):
            raise ExperimentError(
                f"sweep {self.name}: the seeds that confirm a choice must be fresh, got {sorted(shared)} in tune.seeds "
                "too. Take other seeds."
            )

    def _check_places(self) -> None:
        """A setting that stands in two places would be read from one of them."""
        varied = [set(self.axes), set(self.tuned()), set().union(*self.cases)]
        if twice := [key for one, other in itertools.combinations(varied, 2) for key in one & other]:
            raise ExperimentError(
                f"sweep {self.name}: {twice[0]} must stand in one of axes, cases and tune, got two. Take one out."
            )
        if own := sorted(OWN & set(self.settings).union(*varied)):
            raise ExperimentError(
                f"sweep {self.name}: {own[0]} must be left to the sweep, got it as a setting. Name the seeds of runs "
                "in `seeds` and `tune.seeds`."
            )

    @property
    def size(self) -> int:
        """How many runs are asked for, as counted by the lengths of lists."""
        trials = math.prod(map(len, self.tune.values())) if self.tune else 0
        return len(self.cases) * math.prod(map(len, self.axes.values())) * (len(self.seeds) + trials)

    def cells(self) -> list[Cell]:
        """cases x axes: what is compared; seeds and tuned settings are added to each."""
        return [entrants.spelled({**case, **point}) for case in self.cases for point in _crossed(self.axes)]

    def trials(self, cell: Cell, beyond: Sequence[float] = ()) -> list[RunConfig]:
        """The tuning runs of a cell: the grid, as large for every cell, and learning rates beyond it."""
        assert self.tune is not None
        grid = {key: self.tune[key] for key in self.tuned()}
        if beyond:
            grid["lr"] = [*grid["lr"], *beyond]
        return [self._run(cell, point, seed, "validation") for point in _crossed(grid) for seed in self.tune["seeds"]]

    def confirmations(self, cell: Cell, chosen: Mapping[str, Any]) -> list[RunConfig]:
        """The reported runs of a cell with its chosen settings, one per fresh seed."""
        return [self._run(cell, chosen, seed, "test") for seed in self.seeds]

    def tuned(self) -> list[str]:
        """The settings that tuning chooses."""
        return [key for key in self.tune or {} if key != "seeds"]

    def _run(self, cell: Cell, chosen: Mapping[str, Any], seed: int, score_on: str) -> RunConfig:
        # an axis over one of the four seeds holds it while the others follow the seed of the repetition
        fixed = {**self.settings, **cell}
        seeds = {name: seed for name in SEEDS if fixed.get(name) is None}
        return resolve({**fixed, **chosen, **seeds, "score_on": score_on})


def _crossed(axes: Mapping[str, Sequence[Any]]) -> Iterator[Cell]:
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))
