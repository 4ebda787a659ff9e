"""At which points a cell is tuned: those of the grid and beyond it, drawn ones, or those that an Optuna study asks for.

Each sampler gives every cell the same number of points, rates beyond the grid aside, and none cuts a trial short: the
numbers of a run follow from its settings alone. A point at which a run did not train is pruned.
"""

from __future__ import annotations

import fcntl
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from experiments import tasks
from experiments.errors import ExperimentError
from experiments.files import digest, disk_errors, open_lock
from experiments.models import family_of
from experiments.sweeps.sweep import GRID, OPTUNA, RANDOM, Cell, Sweep

# of a sweep's folder: Optuna's journal, with one study for each cell
STUDY = "study.log"
_RATE = "lr"
# of the points of a study, the first are drawn at random: Optuna's number, or a third of a small study
_MOST_DRAWN = 10


def check(sweep: Sweep) -> None:
    """Raises ExperimentError where the sampler's package is missing."""
    if sweep.sampler == OPTUNA:
        try:
            import optuna  # noqa: F401
        except ImportError as error:
            raise ExperimentError(
                f"tune.sampler: the package of optuna must be importable, got: {error}. Run `pip install optuna`, or "
                f"choose {GRID} or {RANDOM}."
            ) from error


def rule(sweep: Sweep, most: int) -> str:
    """How the points were picked, in words."""
    if sweep.sampler == GRID:
        return (
            "where the best rate, or one as good, lies at the edge of those tried, the next of 1 and 3 times powers of "
            f"ten is tried beyond it, at most {most} on a side; where nothing trained, those below, then those above"
        )
    by = "drawn" if sweep.sampler == RANDOM else f"asked for by the TPE of Optuna {version(OPTUNA)}"
    return f"{sweep.points_per_cell} points per cell, {by} between the ends of each list, by factor where positive"


def points(sweep: Sweep, cell: Cell, choice: Mapping[str, Any] | None, folder: Path, most: int) -> list[Cell]:
    """All points of a cell that are to be tried, as far as those that were tried tell; no more means that it is tuned.

    choice: what was chosen among those tried, None before any was. most: rates beyond a side of the grid.
    """
    if sweep.sampler == OPTUNA:
        return _asked(sweep, cell, choice["tried"] if choice else (), folder / STUDY)
    if sweep.sampler == RANDOM or choice is None:
        return expected(sweep, cell)
    rate = _further(sweep, choice, most)
    return sweep.grid([*choice["beyond"], *([] if rate is None else [rate])])


def expected(sweep: Sweep, cell: Cell) -> list[Cell]:
    """The points that are known before any is tried. Drawn ones stand for those of a study."""
    if sweep.sampler == GRID:
        return sweep.grid()
    chance = random.Random(digest(cell))  # numbers that Python promises to keep
    lists = {key: (sweep.tune or {})[key] for key in sweep.tuned()}
    return [
        {key: _between(values, chance.random()) for key, values in lists.items()} for _ in range(sweep.points_per_cell)
    ]


def so_far(sweep: Sweep, cell: Cell, folder: Path) -> list[Cell]:
    """The expected points, in whose place are those that the study in a sweep's folder has asked for. It is only read.

    Raises ExperimentError for a study that Optuna cannot read.
    """
    path, asked = folder / STUDY, list[Cell]()
    if sweep.sampler == OPTUNA and path.exists():
        import optuna

        with _as_optuna_wrote(path):
            storage, name = _storage(path), _name(sweep, cell)
            if name in optuna.get_all_study_names(storage):
                trials = optuna.load_study(study_name=name, storage=storage).trials
                asked = [_point(sweep, trial.params) for trial in trials[: sweep.points_per_cell]]
    return [*asked, *expected(sweep, cell)[len(asked) :]]


def is_range(values: Sequence[Any]) -> bool:
    """Whether a list to tune gives the ends of a range: it holds numbers, and more than one."""
    return len(values) > 1 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def ends(sweep: Sweep) -> list[Cell]:
    """Points in which every value of every list stands: what these cannot be, a point between them may not be."""
    lists = {key: (sweep.tune or {})[key] for key in sweep.tuned()}
    longest = max(map(len, lists.values()), default=0)
    return [{key: values[i % len(values)] for key, values in lists.items()} for i in range(longest)]


def asks(sweep: Sweep, cell: Cell) -> list[str]:
    """Digests of all that decides at which points a cell is tuned, and what is found there."""
    trials = [digest(trial.to_json()) for trial in sweep.trials(cell, expected(sweep, cell))]
    return trials if sweep.sampler == GRID else [*trials, digest({**(sweep.tune or {}), "trials": len(trials)})]


def _between(values: Sequence[Any], share: float) -> Any:
    """What lies at a share in [0, 1) of the way through a range, by factor where it is positive, or of a list."""
    if not is_range(values):
        return values[int(share * len(values))]
    low, high = min(values), max(values)
    whole = all(isinstance(value, int) for value in values)
    end = high + 1 if whole else high  # each integer has its share
    found = low * (end / low) ** share if low > 0 else low + (end - low) * share
    return min(high, math.floor(found)) if whole else min(high, max(low, found))


def beyond(sweep: Sweep, points: Sequence[Cell]) -> list[float]:
    """The rates among these points that lie beyond the grid, in their order."""
    if sweep.sampler != GRID or _RATE not in sweep.tuned():
        return []
    rates = dict.fromkeys(point[_RATE] for point in points)
    return [rate for rate in rates if rate not in (sweep.tune or {})[_RATE]]


def as_good(tried: Sequence[Mapping[str, Any]], chosen: Cell) -> list[Cell]:
    """The points whose score is that of the chosen one, itself among them."""
    (score,) = {each["score"] for each in tried if each["point"] == chosen}
    return [each["point"] for each in tried if each["score"] == score]


def _further(sweep: Sweep, choice: Mapping[str, Any], most: int) -> float | None:
    """The rate beyond the edge at which the best one lies, or one as good; None if all lie inside or enough were tried.

    Below comes first. Where nothing trained no rate is better than another, so that both sides are tried.
    """
    grid, beyond = (sweep.tune or {}).get(_RATE, ()), choice["beyond"]
    if len(grid) < 2:
        return None
    least, largest = min(*grid, *beyond), max(*grid, *beyond)
    best = {point[_RATE] for point in as_good(choice["tried"], choice["chosen"])}
    if least in best and sum(rate < min(grid) for rate in beyond) < most:
        return max(rate for rate in _ladder(least) if rate < least)
    if largest in best and sum(rate > max(grid) for rate in beyond) < most:
        return min(rate for rate in _ladder(largest) if rate > largest)
    return None


def _ladder(rate: float) -> list[float]:
    """1 and 3 times the powers of ten around a rate."""
    power = math.floor(math.log10(rate))
    return [float(f"{digit}e{k}") for k in (power - 1, power, power + 1) for digit in (1, 3)]


def _asked(sweep: Sweep, cell: Cell, tried: Sequence[Mapping[str, Any]], path: Path) -> list[Cell]:
    """The points that the study of a cell has asked for, and one more where all of them were tried.

    What it asks for follows from the cell and from the points before, so that a study that is lost comes out again. Of
    two launchers the one that asks later finds the point of the other.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    wanted, direction = sweep.points_per_cell, _direction(sweep, cell)
    with _as_optuna_wrote(path), _alone(path.with_suffix(".lock")):
        study = optuna.create_study(
            storage=_storage(path), study_name=_name(sweep, cell), direction=direction, load_if_exists=True
        )
        for number, each in enumerate(tried):
            state = optuna.trial.TrialState.PRUNED if each["pruned"] else optuna.trial.TrialState.COMPLETE
            study.tell(number, None if each["pruned"] else each["score"], state=state, skip_if_finished=True)
        if len(study.trials) == len(tried) < wanted:
            # a seed for each: the state of a generator would be lost with the process
            seed = int(digest({"cell": cell, "trial": len(tried)}), 16) % 2**32
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(_MOST_DRAWN, 1 + wanted // 3))
            copy = optuna.create_study(sampler=sampler, direction=direction)
            copy.add_trials(study.trials)
            ranges = _distributions(sweep)
            # one line of the journal: a kill leaves no trial without its point
            state, params = optuna.trial.TrialState.RUNNING, copy.ask(ranges).params
            study.add_trial(optuna.trial.create_trial(state=state, params=params, distributions=ranges))
        return [_point(sweep, trial.params) for trial in study.trials[:wanted]]


def _storage(path: Path) -> Any:
    """Optuna's journal. A file that exists is not written to until a study is told something."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(str(path)))


def _name(sweep: Sweep, cell: Cell) -> str:
    """The study of a cell. Of a sweep that is changed before its choice is locked, the points of before are not its
    own."""
    return f"{sweep.in_words(cell)} {digest({'asks': asks(sweep, cell)})}"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait for whoever holds this lock. The kernel frees that of a process that is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_lock(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _as_optuna_wrote(path: Path) -> Iterator[None]:
    try:
        with disk_errors(path):
            yield
    except ExperimentError:
        raise
    except Exception as error:  # of whatever reads it: it may hold anything after a power cut
        raise ExperimentError(
            f"tune: {path} must be the study as Optuna wrote it, got {error!r}. Move it away and run the same command "
            "again: it asks for the same points, and trials that are finished are not run again."
        ) from error


def _direction(sweep: Sweep, cell: Cell) -> str:
    config = sweep.trials(cell, ends(sweep)[:1])[0]
    task = tasks.get(config.task, config.data, config.metric)
    return "maximize" if family_of(task.family).higher_is_better else "minimize"


def _distributions(sweep: Sweep) -> dict[str, Any]:
    """The ranges of the settings to tune; values that are no range by their JSON, since Optuna stores no lists."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for key in sweep.tuned():
        values = (sweep.tune or {})[key]
        if is_range(values):
            kind = IntDistribution if all(isinstance(value, int) for value in values) else FloatDistribution
            found[key] = kind(min(values), max(values), log=min(values) > 0)
        else:
            found[key] = CategoricalDistribution([json.dumps(value) for value in values])
    return found


def _point(sweep: Sweep, params: Mapping[str, Any]) -> Cell:
    tune = sweep.tune or {}
    return {key: params[key] if is_range(tune[key]) else json.loads(params[key]) for key in sweep.tuned()}
