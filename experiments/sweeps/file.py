"""A sweep from its file. Hydra composes the file and the overrides."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from experiments import tasks
from experiments.errors import ExperimentError
from experiments.models import PACKAGED
from experiments.sweeps.sweep import Sweep, texts
from experiments.tasks import HUB

CONF = Path(__file__).parents[1] / "conf"
# of a file, whose aliases and depth its readers would expand: those at hand have about 1,000 bytes
MOST_BYTES, MOST_DEPTH = 100_000, 20
# where settings stand in a sweep, those that may name files or folders, and the names that stand for none
_PLACED = ("settings", "axes", "cases", "tune")
PATHS, NAMES = ("task", "data", "model", "plugins"), {*tasks.names(), *PACKAGED, HUB}


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
    for text in texts(content):
        # records are published, and `oc.env` would write any variable of this machine into them
        if "${" in text:
            raise ExperimentError(f"sweep: {path} must spell its values out, got {text!r}. Write the value itself.")
    return _sweep(path, dict(content))  # type: ignore[arg-type]


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
    placed = {key: _placed(path.resolve().parent, value) for key, value in content.items() if key in _PLACED}
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
