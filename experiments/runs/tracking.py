"""What trackers are told of a run: which of Transformers' report it, and the names and tags under which they show it.

Nothing of it is among the run's settings: a run that is reported has the folder and the numbers of one that is not.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, TensorBoardCallback

from experiments.checks import check_distinct, check_record
from experiments.errors import ExperimentError
from experiments.files import as_written, read_json, write_json
from experiments.runs.folder import CONFIG

_LABEL = "label.json"
_TENSORBOARD = "TENSORBOARD_LOGGING_DIR"
# packages that are not called as their tracker is
_PACKAGES = {"azure_ml": "azureml-core", "flyte": "flytekit"}


@dataclass(frozen=True)
class Label:
    """Whose run it is: its sweep, the cell that it is compared as, its own name there, and the seed it repeats with."""

    sweep: str
    cell: str
    name: str
    seed: int


@dataclass
class TrackedArguments(TrainingArguments):
    """Transformers' arguments, all of which trackers show beside a run, with the tags of its label."""

    sweep: str | None = None
    cell: str | None = None


def add_option(parser: argparse.ArgumentParser) -> None:
    """The option `--report-to`, which may be repeated."""
    help = "a tracker of Transformers: trackio, tensorboard, wandb, mlflow, .. (none)"
    parser.add_argument("--report-to", action="append", default=[], metavar="TRACKER", help=help)


def words(report_to: Sequence[str]) -> list[str]:
    """The options by which another process reports to the same."""
    return [f"--report-to={name}" for name in report_to]


def check(report_to: Sequence[str]) -> None:
    """Raises ExperimentError for a tracker that Transformers does not know, or whose package cannot be imported."""
    if report_to:
        check_distinct("report_to", report_to)
    for name in report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ExperimentError(f"report_to must name trackers among {known}, got {name!r}. Correct the name.")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except Exception as error:  # whatever it is, the first run would fail of it
            raise ExperimentError(
                f"report_to: the package of {name} must be importable, got: {error} Run `pip install "
                f"{_PACKAGES.get(name, name)}`, or leave {name} out."
            ) from error


def write(folder: Path, label: Label) -> None:
    """Leave the label in the folder of a run, for the process that trains it."""
    write_json(folder / _LABEL, asdict(label))


def _label(folder: Path) -> Label:
    """The label of a run; one that is in no sweep is called as its folder."""
    if not (folder / _LABEL).exists():
        place, seed = folder.resolve(), read_json(folder / CONFIG)["train_seed"]
        return Label(place.parent.name, place.name, place.name, seed)
    found = read_json(folder / _LABEL)
    with as_written(folder / _LABEL, "it"):
        check_record("", Label, found)
    return Label(**found)


def arguments(folder: Path, report_to: Sequence[str]) -> dict[str, Any]:
    """Fields of TrackedArguments: where the run is reported, and as what."""
    if not report_to:
        return {"report_to": "none"}
    label = _label(folder)
    names = {"project": label.sweep, "run_name": label.name}
    return {"report_to": list(report_to), **names, "sweep": label.sweep, "cell": label.cell}


@contextmanager
def named(folder: Path, report_to: Sequence[str]) -> Iterator[None]:
    """Trackers that read names from the environment find this run's, where it does not hold the user's own."""
    before = dict(os.environ)
    label = _label(folder) if report_to else None
    told = {key: before.get(key, name) for key, name in _names(label).items()} if label else {}
    if label and "tensorboard" in report_to:
        told[_TENSORBOARD] = _events(folder, label)
    os.environ.update(told)
    try:
        yield
    finally:
        for key in told:
            del os.environ[key]
        os.environ.update({key: before[key] for key in told if key in before})


def _names(label: Label) -> Mapping[str, str]:
    """The variables of the trackers that Transformers gives no other names."""
    tags = {"sweep": label.sweep, "cell": label.cell, "seed": str(label.seed)}
    said = f"sweep={label.sweep},{label.cell},seed={label.seed}"
    return {
        "WANDB_PROJECT": label.sweep,
        "WANDB_RUN_GROUP": label.cell,
        # a comma ends a tag, so that each setting of the cell becomes one; of 1 to 64 characters, or the run would fail
        "WANDB_TAGS": ",".join(tag[:64] for tag in said.split(",") if tag),
        "MLFLOW_EXPERIMENT_NAME": label.sweep,
        "MLFLOW_TAGS": json.dumps(tags),
        "COMET_PROJECT_NAME": label.sweep,
        "CLEARML_PROJECT": label.sweep,
        "CLEARML_TASK": label.name,
        "SWANLAB_PROJECT": label.sweep,
    }


def _events(folder: Path, label: Label) -> str:
    """TensorBoard calls a run as the folder of its events, which lies beside the runs or where the user says."""
    beside = Path(os.environ.get(_TENSORBOARD) or folder.resolve().parents[1] / "tensorboard")
    # one part of a path each, whatever the label says
    return str(beside / f"sweep={label.sweep}".replace("/", "-") / label.name.replace("/", "-"))


def go_on(trainer: Trainer, step: int) -> None:
    """TensorBoard forgets what it was told of steps after this one, which are run and told again."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback._SummaryWriter = partial(callback._SummaryWriter, purge_step=step + 1)


def end(trainer: Trainer, report_to: Sequence[str]) -> None:
    """Report no more: what is scored after training would begin the run anew in some trackers."""
    for name in report_to:
        trainer.remove_callback(INTEGRATION_TO_CALLBACK[name])
