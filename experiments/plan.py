"""A sweep as a file: which runs it asks for. Hydra composes the file and the overrides."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from experiments import tasks
from experiments.checks import check_distinct, check_fields, check_type
from experiments.config import resolve
from experiments.errors import ExperimentError
from experiments.models import PACKAGED
from experiments.settings import SEEDS, RunConfig
from experiments.tasks.sources import HUB

CONF = Path(__file__).with_name("conf")
# of a file, whose aliases and depth its readers would expand: those at hand have about 1,000 bytes
MOST_BYTES, MOST_DEPTH = 100_000, 20
# where settings stand in a sweep, those that may name files or folders, and the names that stand for none
PLACED = ("settings", "axes", "cases", "tune")
PATHS, NAMES = ("task", "data", "model", "plugins"), {*tasks.names(), *PACKAGED, HUB}
Cell = dict[str, Any]
# what the sweep itself gives to each run
OWN = {"seed", "score_on"}


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says.

    settings: fields of RunConfig that all runs share. cases: settings of which each run has one; axes: settings
    with a list of values, all of which are crossed. tune: `seeds` and the settings to choose among on the validation
    split; seeds: those of the runs that are reported, none of them used for tuning. published: scores others reported,
    by task. launcher: options of the launchers, by name. most_runs: a sweep that asks for more is refused before they
    are worked out.
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
        return [{**case, **point} for case in self.cases for point in _crossed(self.axes)]

    def trials(self, cell: Cell) -> list[RunConfig]:
        """The tuning runs of a cell: as many for every cell."""
        assert self.tune is not None
        grid = {key: values for key, values in self.tune.items() if key != "seeds"}
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


def read(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep of a YAML file. Its `defaults` may take settings from `experiments/conf/settings/`.

    overrides: Hydra's, such as `settings.train_size=64` or `axes.projection=[lora,unilora]`. A relative path is that of
    what lies beside the file, or else in the working directory.
    Raises ExperimentError for a missing or broken file, an unknown key, a value that cannot be or is to be looked up
    (`${..}`), or a relative path that means two things.
    """
    if not path.is_file():
        known = ", ".join(sorted(str(p.relative_to(CONF.parent.parent)) for p in CONF.glob("sweeps/**/*.yaml")))
        raise ExperimentError(f"sweep: {path} must be a YAML file, got none. At hand: {known}.")
    _check_files(path.resolve())
    try:
        with initialize_config_dir(config_dir=str(path.resolve().parent), version_base="1.3"):
            composed = compose(path.stem, overrides=[f"hydra.searchpath=[file://{CONF}]", *overrides])
        content = OmegaConf.to_container(composed)
    except (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError, RecursionError) as error:
        raise ExperimentError(f"sweep: {path} must be a sweep, got: {error}. Repair it or the overrides.") from error
    for text in _texts(content):
        # records are published, and `oc.env` would write any variable of this machine into them
        if "${" in text:
            raise ExperimentError(f"sweep: {path} must spell its values out, got {text!r}. Write the value itself.")
    return _sweep(path, dict(content))  # type: ignore[arg-type]


def _texts(content: Any) -> Iterator[str]:
    """Every text that a sweep holds as a value."""
    if isinstance(content, str):
        yield content
    for held in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from _texts(held)


def _check_files(path: Path) -> None:
    """Raises ExperimentError for a sweep, or a file of its `defaults`, that would take much memory or time to read."""
    waiting, seen = [path], set[Path]()
    while waiting:
        file = waiting.pop()
        if file not in seen and file.is_file():
            seen.add(file)
            _check_yaml(file)
            with suppress(YAMLError, UnicodeError):  # Hydra says what is wrong with it
                content = yaml.safe_load(file.read_bytes())
                names = _names(content.get("defaults") if isinstance(content, dict) else None)
                waiting += [place / f"{name}.yaml" for name in names for place in (path.parent, file.parent, CONF)]


def _names(defaults: Any) -> Iterator[str]:
    """The files of a list of Hydra's `defaults`, without their suffix: `base`, `/settings: minilm`, `optional ..`."""
    for entry in defaults if isinstance(defaults, list) else ():
        for group, chosen in entry.items() if isinstance(entry, dict) else [("", entry)]:
            folder = str(group).split(" ")[-1].partition("@")[0].strip("/")
            for name in chosen if isinstance(chosen, list) else [chosen]:
                yield f"{folder}/{name}".strip("/").partition("@")[0].removesuffix(".yaml")


def _check_yaml(file: Path) -> None:
    if (size := file.stat().st_size) > MOST_BYTES:
        raise ExperimentError(f"sweep: {file} must have at most {MOST_BYTES:,} bytes, got {size:,}. Is it a sweep?")
    depth = 0
    with suppress(YAMLError, UnicodeError):
        for event in yaml.parse(file.read_bytes(), yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > MOST_DEPTH:
                found = f"the alias *{event.anchor}" if depth <= MOST_DEPTH else "more"
                raise ExperimentError(
                    f"sweep: {file} must spell its values out, at most {MOST_DEPTH} lists and mappings deep, got "
                    f"{found} in line {event.start_mark.line + 1}. Write the values themselves."
                )


def _sweep(path: Path, content: dict[str, Any]) -> Sweep:
    known = [f.name for f in fields(Sweep)]
    content.setdefault("name", path.stem)
    if unknown := sorted(set(content) - set(known), key=str):
        raise ExperimentError(f"sweep: {path} has unknown keys {unknown}. Known: {', '.join(known)}.")
    placed = {key: _placed(path.resolve().parent, value) for key, value in content.items() if key in PLACED}
    return Sweep(**{**content, **placed})


def _placed(folder: Path, content: Any, key: str = "") -> Any:
    """The content of a sweep in `folder`, with its relative paths as they are read from the working directory."""
    if isinstance(content, dict):
        return {key: _placed(folder, value, key) for key, value in content.items()}
    if isinstance(content, list):
        return [_placed(folder, value, key) for value in content]
    is_path = key in PATHS and isinstance(content, str) and content not in NAMES
    if not is_path or (key == "plugins" and not content.endswith(".py")):
        return content
    beside, here = folder / content, Path(content)
    if beside.exists() and here.exists() and not beside.samefile(here):
        raise ExperimentError(
            f"sweep: {key} {content} must lie in one place, got {beside} and {here.absolute()}. Write the whole path."
        )
    # data keep the name that they are given in tables; a plugin is found wherever one of its runs is started again
    if here.exists() and key != "plugins":
        return content
    found = beside if beside.exists() else here
    return os.path.abspath(found) if found.exists() else content
