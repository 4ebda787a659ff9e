"""A sweep from end to end: the protocol, a user's own data and projection, the doctor and the estimate."""

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from experiments import sweep
from experiments.errors import ExperimentError
from experiments.files import read_json, write_json
from experiments.records.reading import CHOICE, load
from experiments.runs.folder import CONFIG, RESULT
from experiments.sweeps import protocol
from experiments.sweeps.file import read

ROOT = Path(__file__).parents[3]


def test_tune_lock_confirm(swept: tuple[Path, Path]) -> None:
    folder, records = swept[1] / "sweeps" / "mine", load(swept[1])
    tuning, confirmed = records[records["score_on"] == "validation"], records[records["score_on"] == "test"]
    assert len(tuning) == len(confirmed) == 4 and not set(tuning["train_seed"]) & set(confirmed["train_seed"])
    for choice in read_json(folder / CHOICE)["choices"]:
        own = tuning[(tuning["projection"] == choice["cell"]["projection"]) & tuning["did_not_train"].isna()]
        if len(own):
            best = own.sort_values(["validation_best", "lr"], ascending=[False, True])["lr"].iloc[0]
            assert choice["chosen"]["lr"] == best
        used = confirmed[confirmed["projection"] == choice["cell"]["projection"]]
        assert set(used["lr"]) == {choice["chosen"]["lr"]}
    tables = (folder / "tables.txt").read_text()
    assert "2 trials per cell" in tables and "best" in tables and (folder / "paired.csv").exists()


def test_the_same_command_does_nothing_again_and_a_changed_grid_is_refused(swept: tuple[Path, Path], capsys) -> None:
    file, runs = swept
    stamps = {path: path.stat().st_mtime_ns for path in runs.rglob(RESULT)}
    assert sweep.main([str(file), "--runs", str(runs)]) == 0
    assert (runs / "sweeps" / "mine" / "tables.txt").read_text() in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in runs.rglob(RESULT)} == stamps
    assert sweep.main([str(file), "tune.lr=[0.01,0.1]", "--runs", str(runs)]) == 2
    assert "changed after its choice was locked" in capsys.readouterr().err


def test_the_best_and_the_last_checkpoint_are_both_scored(swept: tuple[Path, Path]) -> None:
    records = load(swept[1])
    for record in records[records["score_on"] == "test"].to_dict("records"):
        last = pd.read_csv(Path(record["folder"]) / "predictions-last.csv")
        assert record["score"] == (last["label"] == last["prediction"]).mean()
        best = Path(record["folder"]) / "predictions-best.csv"
        assert best.exists() == (record["best_step"] != record["step"])
        rows = pd.read_csv(best) if best.exists() else last
        assert record["best"]["score"] == (rows["label"] == rows["prediction"]).mean()
        assert record["validation_best"] >= record["validation"]
    assert not list(swept[1].rglob("checkpoint-*"))


def test_own_data_and_own_projection_join_as_the_docs_show(
    runs: Path, tmp_path: Path, task: str, model: str, here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep of the docs on a smaller model, from a folder outside the repository, without its task from the hub."""
    (shown,) = re.findall(r"```yaml\n(# mine.yaml\n.*?)```", (ROOT / "docs" / "experiments.md").read_text(), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(shown.replace("glue/sst2, ", ""))
    own = (ROOT / "examples" / "cyclic.py").read_text().replace('"cyclic"', '"my_projection"')
    (tmp_path / "my_projection.py").write_text(own)
    shutil.copytree(task, tmp_path / "my_reviews")
    monkeypatch.chdir(tmp_path)
    smaller = [f"settings.model={model}", "settings.budget=200", "settings.train_size=64", "~tune", "seeds=[1]"]
    overrides = [*smaller, "+settings.lr=0.05", "settings.epochs=1"]
    assert sweep.main(["mine.yaml", *overrides, "--runs", str(runs)]) == 0
    found = load(runs)
    assert sorted(found["projection"]) == ["lora", "my_projection", "unilora"] and set(found["task"]) == {"my_reviews"}
    shared = found[found["projection"] != "lora"]
    assert set(shared["trained"]) == {200} and (found["theta_change"] > 0).all()


def test_a_plugin_that_cannot_be_imported_is_named(file: Path, runs: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    assert sweep.main([str(file), f"+settings.plugins=[{tmp_path / 'broken.py'}]", "--runs", str(runs)]) == 2
    assert "broken.py must be a Python file or module that can be imported" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+launcher.local={gpus:2}"], "launcher.local must have keys among processes, sharded"),
        (["+launcher.slurm={gpus:2}"], "launcher.slurm must have keys among parameters, concurrency"),
        (["+launcher.local={processes:two}"], "launcher.local.processes must be an integer, got 'two'"),
        (["+launcher.local={processes:0}"], "launcher.local.processes must be positive, got 0"),
        (["+launcher.pbs={time:1}"], "launcher must have keys among local, slurm, got pbs"),
        (["axes.projection=[lora]", "+settings.target_modules=[nope]"], "must have modules called {'nope'}"),
        (["~settings.budget", "+settings.d=1000000"], "d must be at most D = 1024 on"),
    ],
)
def test_what_could_not_be_trained_is_refused_before(
    overrides: list[str], message: str, file: Path, runs: Path, capsys
) -> None:
    for more in ([], ["--dry-run"]):
        assert sweep.main([str(file), *overrides, *more, "--runs", str(runs)]) == 2
        assert message in capsys.readouterr().err and not runs.exists()


def test_doctor_runs_each_kind_once_and_feeds_the_estimate(file: Path, runs: Path, capsys) -> None:
    assert sweep.main([str(file), "--doctor", "--runs", str(runs)]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 kinds of run work" in out and not list(runs.rglob(RESULT))
    assert sweep.main([str(file), "--dry-run", "--runs", str(runs)]) == 0
    out = capsys.readouterr().out
    assert "GB per run" in out and "h of training steps" in out and "not known" not in out


def test_doctor_reports_what_would_fail_in_the_queue(file: Path, runs: Path, capsys, monkeypatch) -> None:
    from experiments.runs.run import Run

    monkeypatch.setattr(Run, "load", lambda folder: (_ for _ in ()).throw(RuntimeError("no room")))
    assert sweep.main([str(file), "--doctor", "--runs", str(runs)]) == 1
    assert "FAILED" in (out := capsys.readouterr().out) and "no room" in out and "0 of 2 kinds of run work" in out


@pytest.mark.parametrize(("scores", "modules"), [([None] * 4, ["query"]), ([None, None, 2.0, 3.0], ["query", "value"])])
def test_any_setting_can_be_tuned_and_a_cell_is_never_left_out(scores, modules, file: Path, runs: Path) -> None:
    """Lists, null and a single value; where every trial diverged the first one is taken, at no edge of one value.

    Where none trained, one that did not diverge is taken, by a loss that is better when lower.
    """
    tuned = ["tune.lr=[0.01]", "+tune.target_modules=[[query],[query,value]]", "+tune.alpha=[null,8]"]
    asked = read(file, [*tuned, "axes.projection=[unilora]"])

    def diverged(folders) -> dict[Path, str]:
        for folder, score in zip(folders, scores, strict=True):
            result = {"config": read_json(folder / CONFIG), "score": None, "did_not_train": "nan", "validation": None}
            more = {"validation_best": score, "higher_is_better": False, "cost": {"seconds": 1.0}, "selection": "loss"}
            more["metric"] = "accuracy"
            write_json(folder / RESULT, {**result, **more})
        return {}

    (chosen,) = protocol.tune(asked, runs, diverged).values()
    assert chosen == {"lr": 0.01, "target_modules": modules, "alpha": None}
    (choice,) = read_json(protocol.sweep_folder(runs, asked) / CHOICE)["choices"]
    assert choice["at_edge"] == ["target_modules", "alpha"] and not choice["trained"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lock: lock["choices"][0]["chosen"].update(lr=0.03), r"chosen {'lr': 0.05}, got {'lr': 0.03}. It was"),
        (lambda lock: lock["choices"][0]["chosen"].update(lr=0.01), r"chosen {'lr': 0.05}, got {'lr': 0.01}. It was"),
        (lambda lock: lock["choices"][0]["trials"][0].update(validation_best=1.0), "what its trials say, trials"),
        (lambda lock: lock["choices"].clear(), "what its trials say, chosen {'lr': 0.05}, got none"),
        (lambda lock: lock.update(choices=5), "choices must be a list of values, got 5 It was|choices must be a list"),
        (lambda lock: lock.clear(), "trials_digest must be there, got keys none"),
    ],
    ids=["off the grid", "another", "better", "none", "a number", "nothing"],
)
def test_a_choice_that_its_trials_do_not_make_is_not_believed(edit, message: str, file: Path, runs: Path) -> None:
    asked, scored = read(file, ["axes.projection=[unilora]"]), {0.01: 0.1, 0.05: 0.5, 0.1: 0.4}

    def trained(folders) -> dict[Path, str]:
        for folder in folders:
            config = read_json(folder / CONFIG)
            result = {"config": config, "metric": "accuracy", "score": scored[config["lr"]], "did_not_train": None}
            more = {"validation": 0.5, "validation_best": scored[config["lr"]], "higher_is_better": True}
            write_json(folder / RESULT, {**result, **more, "cost": {"seconds": 1.0}})
        return {}

    def never(folders) -> dict[Path, str]:
        raise AssertionError("the choice was locked")

    chosen = protocol.tune(asked, runs, trained)
    assert list(chosen.values()) == [{"lr": 0.05}] and protocol.tune(asked, runs, never) == chosen
    path = protocol.sweep_folder(runs, asked) / CHOICE
    lock = read_json(path)
    edit(lock)
    write_json(path, lock)
    with pytest.raises(ExperimentError, match=message):
        protocol.tune(asked, runs, never)


def test_a_choice_without_its_trials_is_not_believed(file: Path, runs: Path) -> None:
    test_any_setting_can_be_tuned_and_a_cell_is_never_left_out([None] * 4, ["query"], file, runs)
    tuned = ["tune.lr=[0.01]", "+tune.target_modules=[[query],[query,value]]", "+tune.alpha=[null,8]"]
    asked = read(file, [*tuned, "axes.projection=[unilora]"])
    next(runs.rglob(RESULT)).unlink()
    with pytest.raises(ExperimentError, match="must be a finished trial, from which the choice was made, got none"):
        protocol.tune(asked, runs, lambda _: {})
