"""A sweep as a file: which runs it asks for. Hydra composes the file and the overrides."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.checks import check_distinct, check_fields, check_positive, check_type
from experiments.errors import ExperimentError
from experiments.files import digest, short_names
from experiments.runs import SEEDS, RunConfig, entrants, resolve, tracking

Cell = dict[str, Any]
# of tune, what is no setting
_SEARCH = ("seeds", "sampler", "trials")
GRID, RANDOM, OPTUNA = _SAMPLERS = "grid", "random", "optuna"
# bytes of a name before its digest: Weights & Biases takes 128 characters, and a folder may have 255 bytes
_LONGEST = 100
# what the sweep itself gives to each run
OWN = {"seed", "score_on"}


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says.

    settings: fields of RunConfig that all runs share. cases: settings of which each run has one; axes: settings with a
    list of values, all of which are crossed. A projection may be any entrant, written as `name` or `{name: options}`.
    tune: `seeds` and the settings to choose among on the validation split, `sampler` and `trials`: how, and at how many
    points where it is not the grid. seeds: those of the runs that are reported, none of them used for tuning.
    published: scores others reported, by task. launcher: options of the launchers, by name. report_to: trackers of
    Transformers that hear of each run. most_runs: a sweep that asks for more is refused before they are worked out.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    cases: Sequence[Mapping[str, Any]] = ({},)
    tune: Mapping[str, Any] | None = None
    seeds: Sequence[int] = (0,)
    published: Mapping[str, Any] = field(default_factory=dict)
    launcher: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    report_to: Sequence[str] = ()
    most_runs: int = 10_000

    def __post_init__(self) -> None:
        sweep = f"sweep {self.name}: "
        check_fields(sweep, Sweep, vars(self))
        # the name is that of a folder
        if self.name != Path(self.name).name or self.name in ("", "..") or not self.name.isprintable():
            raise ExperimentError(
                f"{sweep}name must be that of one folder, got {self.name!r}. Leave slashes and control characters out."
            )
        if self.tune is not None:
            self._check_tune(self.tune)
        if self.size > self.most_runs:
            raise ExperimentError(
                f"{sweep}the crossed axes, cases and seeds must ask for at most {self.most_runs:,} runs, got "
                f"{self.size:,}. Shorten an axis, or raise most_runs in the file."
            )
        for what in ("cases", "seeds"):
            check_distinct(sweep + what, getattr(self, what))
        for what, keys in (("axes", self.axes), ("tune", self.tune and ("seeds", *self.tuned()))):
            for key in keys or ():
                check_distinct(f"{sweep}{what}.{key}", getattr(self, what)[key])
        self._check_places()

    def _check_tune(self, tune: Mapping[str, Any]) -> None:
        where = f"sweep {self.name}: tune."
        if "seeds" not in tune or not self.tuned():
            raise ExperimentError(
                f"sweep {self.name}: tune needs `seeds` and at least one setting with a list of values, such as "
                f"lr: [1e-3, 1e-2], got {dict(tune)}."
            )
        check_type(f"{where}seeds", tune["seeds"], Sequence[int])
        for key in self.tuned():
            check_type(where + key, tune[key], Sequence[Any])
        if self.sampler not in _SAMPLERS:
            raise ExperimentError(
                f"{where}sampler must be one of {', '.join(_SAMPLERS)}, got {self.sampler!r}. Correct it."
            )
        if "trials" in tune:
            check_type(f"{where}trials", tune["trials"], int)
            check_positive(where, tune, ("trials",))
            if self.sampler == GRID:
                raise ExperimentError(
                    f"{where}trials must be left to the lists of the grid, all of whose points are tried, got "
                    f"{tune['trials']}. Take it out, or name the sampler {RANDOM} or {OPTUNA}."
                )
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
        return len(self.cases) * math.prod(map(len, self.axes.values())) * (len(self.seeds) + self.trials_per_cell)

    @property
    def sampler(self) -> str:
        """How the points that a cell is tuned at are picked."""
        return (self.tune or {}).get("sampler", GRID)

    @property
    def points_per_cell(self) -> int:
        """At how many points each cell is tuned: those of the grid, unless `trials` says another number."""
        tune = self.tune or {"trials": 0}
        return tune["trials"] if "trials" in tune else math.prod(len(tune[key]) for key in self.tuned())

    @property
    def trials_per_cell(self) -> int:
        """How many runs tune a cell, rates beyond the grid aside: each point once with each seed."""
        return self.points_per_cell * len((self.tune or {}).get("seeds", ()))

    def cells(self) -> list[Cell]:
        """cases x axes: what is compared; seeds and tuned settings are added to each."""
        return [entrants.spelled({**case, **point}) for case in self.cases for point in _crossed(self.axes)]

    def grid(self, beyond: Sequence[float] = ()) -> list[Cell]:
        """The values to tune, crossed, with learning rates beyond theirs."""
        lists = {key: (self.tune or {})[key] for key in self.tuned()}
        if beyond:
            lists["lr"] = [*lists["lr"], *beyond]
        return list(_crossed(lists))

    def trials(self, cell: Cell, points: Sequence[Cell] | None = None) -> list[RunConfig]:
        """The tuning runs of a cell at these points, or at those of the grid."""
        assert self.tune is not None
        points = self.grid() if points is None else points
        return [self._run(cell, point, seed, "validation") for point in points for seed in self.tune["seeds"]]

    def confirmations(self, cell: Cell, chosen: Mapping[str, Any]) -> list[RunConfig]:
        """The reported runs of a cell with its chosen settings, one per fresh seed."""
        return [self._run(cell, chosen, seed, "test") for seed in self.seeds]

    def tuned(self) -> list[str]:
        """The settings that tuning chooses."""
        return [key for key in self.tune or {} if key not in _SEARCH]

    def label(self, cell: Cell, config: RunConfig) -> tracking.Label:
        """How trackers show a run of a cell: `projection=unilora,lr=0.01,seed=0` in a project called as the sweep."""
        free = [name for name in SEEDS if {**self.settings, **cell}.get(name) is None]
        seed = getattr(config, free[0] if free else SEEDS[0])
        name = self.in_words({**cell, **{key: getattr(config, key) for key in self.tuned()}, "seed": seed})
        return tracking.Label(self.name, _cut(self.in_words(cell), cell), _cut(name, config.to_json()), seed)

    def in_words(self, settings: Cell) -> str:
        """Settings as `projection=unilora,r=4`; of a path what tells it from the others of the sweep."""
        return ",".join(f"{key}={self._word(value)}" for key, value in settings.items())

    def _word(self, value: Any) -> str:
        if isinstance(value, list | tuple):
            return "+".join(map(self._word, value))
        if isinstance(value, Mapping):
            return "+".join(f"{key}:{self._word(held)}" for key, held in value.items())
        return f"{value:g}" if isinstance(value, float) else self._short.get(str(value), str(value))

    @cached_property
    def _short(self) -> Mapping[str, str]:
        return short_names(texts([self.cells(), self.tune]))

    def _run(self, cell: Cell, chosen: Mapping[str, Any], seed: int, score_on: str) -> RunConfig:
        # an axis over one of the four seeds holds it while the others follow the seed of the repetition
        fixed = {**self.settings, **cell}
        seeds = {name: seed for name in SEEDS if fixed.get(name) is None}
        return resolve({**fixed, **chosen, **seeds, "score_on": score_on})


def texts(content: Any) -> Iterator[str]:
    """Every text that lists and mappings hold as a value."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, Mapping | list | tuple):
        for held in content.values() if isinstance(content, Mapping) else content:
            yield from texts(held)


def _cut(name: str, told: Mapping[str, Any]) -> str:
    """A name as it is, or the beginning of a long one and the digest of what it tells."""
    text = name.encode()
    return name if len(text) <= _LONGEST else f"{text[:_LONGEST].decode(errors='ignore')}-{digest(told)}"


def _crossed(axes: Mapping[str, Sequence[Any]]) -> Iterator[Cell]:
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))
