"""Trackers: what they are told of a run, and that a run that is reported is the same run."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import pytest

from experiments import compare, sweep, train
from experiments.errors import INTERRUPTED, ExperimentError
from experiments.files import read_json
from experiments.records.reading import losses
from experiments.runs import tracking
from experiments.runs.config import RunConfig
from experiments.runs.folder import RESULT, prepare
from experiments.runs.tracking import Label
from experiments.sweeps import launchers, slurm, workers
from experiments.sweeps.file import read
from tests.experiments.processes import train_until

NAME = "projection=unilora,lr=0.05,seed=0"


@pytest.mark.parametrize("killed", [False, True])
def test_tensorboard_shows_the_losses_under_the_names_of_the_run(killed: bool, runs: Path, config: RunConfig) -> None:
    """A run that is reported, interrupted and resumed has the id, the numbers and the log of one that is none of it."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = replace(config, timing=False, evaluations=2).to_json()
    plain, reported = (prepare(runs / name, settings) for name in ("plain", "reported"))
    tracking.write(reported, Label("mine", "projection=unilora", NAME, 0))
    words = [str(reported), "--report-to", "tensorboard"]
    assert train_until(10, *words) == INTERRUPTED
    if killed:  # no checkpoint is later than that of step 6, though step 10 was told
        shutil.rmtree(reported / "checkpoint-10")
    assert train.main(words) == train.main([str(plain)]) == 0
    events = reader.EventAccumulator(str(runs / "reported" / "tensorboard" / "sweep=mine" / NAME)).Reload()
    logged = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert logged == [(line["step"], pytest.approx(line["loss"])) for line in losses(reported)] and logged
    assert [event.step for event in events.Scalars("eval/score")] == [6, 12]
    shown = json.loads(events.Tensors("args/text_summary")[0].tensor_proto.string_val[0])
    names = {"project": "mine", "run_name": NAME, "sweep": "mine", "cell": "projection=unilora", "seed": 0}
    assert {key: shown[key] for key in names} == names
    # the mean loss that a killed run logs first is over the steps since its checkpoint
    assert reported.name == plain.name and (killed or losses(reported) == losses(plain))
    first, second = (read_json(folder / RESULT) for folder in (plain, reported))
    assert {**first, "cost": 0, "provenance": 0} == {**second, "cost": 0, "provenance": 0}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Trackio keeps its runs, which it asks for when it is imported, here or in a test before."""
    pytest.importorskip("trackio")
    for module in [module for name, module in sys.modules.items() if name.startswith("trackio")]:
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "store")
    return tmp_path / "store"


def test_a_sweep_is_a_project_of_trackio(store: Path, file: Path, runs: Path, monkeypatch) -> None:
    def here(folders: Sequence[Path], device: str, over: object, report_to: Sequence[str]) -> dict[Path, str]:
        (words,) = ([str(folder), *tracking.words(report_to)] for folder in folders)
        assert (train_until(10, *words), train.main(words)) == (INTERRUPTED, 0)
        return {}

    monkeypatch.setattr(launchers, "train_all", here)
    overrides = ["~tune", "+settings.lr=0.05", "axes.projection=[unilora]", "seeds=[1]", "+report_to=[trackio]"]
    assert sweep.main([str(file), *overrides, "--runs", str(runs)]) == 0
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = trackio.Api().runs("mine")
    assert run.name == "projection=unilora,seed=1" and list(store.glob("mine.db"))
    tags = {"sweep": "mine", "cell": "projection=unilora", "seed": 1}
    assert {key: run.config[key] for key in tags} == tags
    logged = [line["train/loss"] for line in SQLiteStorage.get_logs("mine", run.name) if "train/loss" in line]
    (folder,) = runs.glob("*/unilora-*")
    assert logged == [pytest.approx(line["loss"]) for line in losses(folder)] and logged


def test_a_tracker_that_cannot_be_told_is_refused_before_any_run(
    file: Path, model: str, task: str, runs: Path, monkeypatch, capsys
) -> None:
    def missing() -> None:
        raise RuntimeError("WandbCallback requires wandb to be installed.")

    monkeypatch.setitem(tracking.INTEGRATION_TO_CALLBACK, "wandb", missing)
    for name, said in (
        ("wandb", "the package of wandb must be importable, got: WandbCallback requires wandb to be installed. Run "
         "`pip install wandb`"),
        ("tensorbored", "must name trackers among azure_ml, "),
    ):  # fmt: skip
        compared = ["--model", model, "--task", task, "--projections", "unilora", "--budget", "200", "--lr", "0.1"]
        for command, given in (
            (sweep, [str(file), "--report-to", name]),
            (sweep, [str(file), f"+report_to=[{name}]", "--dry-run"]),
            (compare, [*compared, "--report-to", name]),
        ):
            assert command.main([*given, "--runs", str(runs)]) == 2
            assert said in capsys.readouterr().err and not runs.exists()
    with pytest.raises(ExperimentError, match="report_to must hold each value once, got 'wandb' twice"):
        tracking.check(["wandb", "wandb"])


def test_the_environment_holds_names_for_the_time_of_a_run(tmp_path: Path, config: RunConfig, monkeypatch) -> None:
    folder = prepare(tmp_path, config.to_json())
    tracking.write(folder, Label("mine", "projection=unilora,r=4", NAME, 3))
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    before = dict(os.environ)
    with tracking.named(folder, ["wandb", "tensorboard"]):
        told = dict(os.environ)
    assert dict(os.environ) == before
    # the user's own
    assert told["WANDB_PROJECT"] == "ours" and told["MLFLOW_EXPERIMENT_NAME"] == "mine"
    assert told["WANDB_TAGS"].split(",") == ["sweep=mine", "projection=unilora", "r=4", "seed=3"]
    assert json.loads(told["MLFLOW_TAGS"]) == {"sweep": "mine", "cell": "projection=unilora,r=4", "seed": "3"}
    assert Path(told["TENSORBOARD_LOGGING_DIR"]) == tmp_path / "board" / "sweep=mine" / NAME
    with tracking.named(folder, []):
        assert dict(os.environ) == before


def test_a_run_of_no_sweep_is_called_as_its_folder_and_a_forged_label_stays_in_place(
    tmp_path: Path, config: RunConfig
) -> None:
    folder = prepare(tmp_path, config.to_json())
    told = tracking.arguments(folder, ["trackio"])
    assert (told["project"], told["run_name"], told["report_to"]) == (folder.parent.name, folder.name, ["trackio"])
    assert tracking.arguments(folder, []) == {"report_to": "none"}
    tracking.write(folder, Label("..", "", "../../elsewhere", 0))
    with tracking.named(folder, ["tensorboard"]):
        place = Path(os.environ["TENSORBOARD_LOGGING_DIR"]).resolve()
    assert place.is_relative_to(tmp_path / "tensorboard")
    (folder / "label.json").write_text('{"sweep": 3}')
    with pytest.raises(ExperimentError, match=r"label\.json must be as it was written"):
        tracking.arguments(folder, ["trackio"])


def test_every_run_of_a_sweep_has_a_name_of_its_own(file: Path) -> None:
    axes = {
        "projection": ["unilora", "fastfood"],
        "projection_seed": [7, 8],
        "label_noise": [0.0, 0.1],
        "target_modules": [["query"], ["query", "value"]],
    }
    file.write_text(json.dumps({**json.loads(file.read_text()), "axes": axes}))
    asked = read(file)
    runs = [
        (cell, run) for cell in asked.cells() for run in (*asked.trials(cell), *asked.confirmations(cell, {"lr": 0.01}))
    ]
    labels = [asked.label(cell, run) for cell, run in runs]
    assert len({label.name for label in labels}) == len(runs) == 16 * (2 + 2)
    assert {label.sweep for label in labels} == {"mine"} and len({label.cell for label in labels}) == 16
    # the seed that is repeated, not the one that an axis holds
    assert {label.seed for label in labels} == {0, 1, 2}
    assert "projection=unilora,projection_seed=7,label_noise=0,target_modules=query+value,lr=0.05,seed=0" in {
        label.name for label in labels
    }


def test_names_hold_no_path_and_what_trackers_take(file: Path, tmp_path: Path, task: str, model: str) -> None:
    """Weights & Biases: tags of 1 to 64 characters, names of at most 128; a folder has a name of at most 255 bytes."""
    content = json.loads(file.read_text())
    plugin = tmp_path / f"{'mine' * 20}.py"
    plugin.write_text("")
    content |= {"axes": {"plugins": [[str(plugin)], []]}, "tune": {"seeds": [0], "model": [model]}}
    content["settings"] = {"task": task, "projection": "unilora", "d": 64, "lr": 0.1}
    file.write_text(json.dumps(content))
    asked = read(file)
    for cell in asked.cells():
        (run,) = asked.trials(cell)
        label = asked.label(cell, run)
        assert "/" not in label.cell + label.name and Path(model).name in asked.in_words({"model": model})
        tags = tracking._names(label)["WANDB_TAGS"].split(",")
        assert all(1 <= len(tag) <= 64 for tag in tags) and len(label.name) <= 128 and len(label.cell) <= 128
    empty = tracking._names(Label("mine", "", "seed=0", 0))["WANDB_TAGS"]
    assert empty == "sweep=mine,seed=0"
    wide = asked.label({"task": "漢" * 150}, run)
    assert len(wide.name.encode()) <= 128 and wide.name.startswith("task=漢漢")


def test_workers_hand_the_trackers_on(file: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def popen(command: list[str], **_: object) -> None:
        started.append(command)
        raise KeyboardInterrupt

    monkeypatch.setattr(workers.subprocess, "Popen", popen)
    asked = ["--report-to", "tensorboard", "--runs", str(runs)]
    pytest.importorskip("tensorboard")
    assert sweep.main([str(file), *asked]) == INTERRUPTED
    assert started[0][-1] == "--report-to=tensorboard"
    assert compare.parse(["--report-to", "a", "--report-to", "b"]).report_to == ["a", "b"]


def test_slurm_hands_the_trackers_on(file: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As what is submitted is pickled, carried to a node and called there."""
    submitted: list[bytes] = []

    class Executor:
        def __init__(self, **_: object) -> None:
            self.batch = nullcontext
            self.update_parameters = dict

        def submit(self, job: Callable[[str], int], folder: str) -> None:
            submitted.append(cloudpickle.dumps((job, folder)))
            raise KeyboardInterrupt

    monkeypatch.setattr(slurm.submitit, "SlurmExecutor", Executor)
    monkeypatch.setattr(slurm, "_queued", set)
    asked = ["--launcher", "slurm", "--report-to", "tensorboard", "--report-to", "trackio"]
    monkeypatch.setattr(tracking, "check", lambda _: None)
    assert sweep.main([str(file), *asked, "--runs", str(runs)]) == INTERRUPTED

    started: list[list[str]] = []

    def popen(command: list[str], **_: object) -> SimpleNamespace:
        started.append(command)
        return SimpleNamespace(wait=lambda: 0, returncode=0)

    monkeypatch.setattr(workers.subprocess, "Popen", popen)
    job, folder = cloudpickle.loads(submitted[0])
    assert job(folder) == 0
    assert started[0][-3:] == [folder, "--report-to=tensorboard", "--report-to=trackio"]
    assert list(runs.glob("*/*/label.json"))
