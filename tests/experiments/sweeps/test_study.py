"""Samplers of tuning: the same number of points for every cell, within the ranges, and the same after a kill."""

import json
import math
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from experiments import sweep as command
from experiments.errors import ExperimentError
from experiments.files import digest, read_json, write_json
from experiments.records.reading import CHOICE
from experiments.runs.folder import CONFIG, RESULT
from experiments.sweeps import protocol, report, study
from experiments.sweeps.file import read
from experiments.sweeps.sweep import Sweep

RANGE = ["tune.lr=[0.001,1.0]", "+tune.trials=6"]


def _score(rate: float) -> float | None:
    """Best at a rate of 0.02; nothing trains at one above 0.2."""
    return None if rate > 0.2 else 1 - 0.1 * abs(math.log10(rate / 0.02))


def _trainer(trained: list[float], most: int | None = None) -> protocol.Train:
    """Writes the result of every trial that has none; after `most` of them, Ctrl-C."""

    def train(folders: Sequence[Path]) -> dict[Path, str]:
        for folder in (folder for folder in folders if not (folder / RESULT).exists()):
            if len(trained) == most:
                raise KeyboardInterrupt
            config = read_json(folder / CONFIG)
            score = _score(config["lr"])
            result = {"config": config, "metric": "accuracy", "did_not_train": None if score else "it diverged"}
            scores = dict.fromkeys(("score", "validation", "validation_best"), score)
            cost = {"seconds": 1.0, "train_seconds": 1.0, "peak_bytes": 1}
            write_json(folder / RESULT, {**result, **scores, "higher_is_better": True, "cost": cost})
            trained.append(config["lr"])
        return {}

    return train


def _never(folders: Sequence[Path]) -> dict[Path, str]:
    raise AssertionError(f"all trials were finished, got {folders}")


def _choices(runs: Path, sweep: Sweep) -> list[dict]:
    return read_json(protocol.sweep_folder(runs, sweep) / CHOICE)["choices"]


@pytest.fixture(params=["random", "optuna"])
def sampled(request: pytest.FixtureRequest, file: Path) -> Sweep:
    if request.param == "optuna":
        pytest.importorskip("optuna")
    return read(file, [*RANGE, f"+tune.sampler={request.param}"])


def test_every_cell_has_the_same_number_of_points_within_the_range(sampled: Sweep, runs: Path) -> None:
    trained: list[float] = []
    chosen = list(protocol.tune(sampled, runs, _trainer(trained)).values())
    choices = _choices(runs, sampled)
    assert len(choices) == 2 and len(trained) == 2 * 6 == len(set(trained))
    for choice, best in zip(choices, chosen, strict=True):
        rates = [trial["lr"] for trial in choice["trials"]]
        assert len(rates) == 6 and all(0.001 <= rate <= 1.0 for rate in rates) and choice["beyond"] == []
        assert best["lr"] == max((rate for rate in rates if rate <= 0.2), key=_score)
    assert read_json(protocol.sweep_folder(runs, sampled) / CHOICE)["trials_per_cell"] == 6
    assert [trial["lr"] for trial in choices[0]["trials"]] != [trial["lr"] for trial in choices[1]["trials"]]


def test_pruned_points_are_recorded_with_their_reason(sampled: Sweep, runs: Path) -> None:
    protocol.tune(sampled, runs, _trainer([]))
    tried = [point for choice in _choices(runs, sampled) for point in choice["tried"]]
    assert any(point["pruned"] for point in tried) and len(tried) == 12
    for point in tried:
        rate = point["point"]["lr"]
        assert (point["score"], point["pruned"]) == ((_score(rate), None) if rate <= 0.2 else (None, "it diverged"))
    summary, records = (
        pd.DataFrame({"status": ["complete"], "stuck": [None], "budget_error": [0.0]}),
        {"failed": [None]},
    )
    notes = report._notes(sampled, protocol.sweep_folder(runs, sampled), pd.DataFrame(records), summary)
    pruned = sum(point["point"]["lr"] > 0.2 for point in tried)
    assert f"{pruned} of 12 points of the tuning were pruned, since a run did not train." in notes


def test_a_study_that_is_killed_goes_on_to_the_same_trials(sampled: Sweep, runs: Path, tmp_path: Path) -> None:
    whole: list[float] = []
    expected = protocol.tune(sampled, tmp_path / "whole", _trainer(whole))
    first, second = [], []
    with pytest.raises(KeyboardInterrupt):
        protocol.tune(sampled, runs, _trainer(first, most=7))
    assert protocol.tune(sampled, runs, _trainer(second)) == expected
    assert sorted(first + second) == sorted(whole) and len(first) == 7
    assert _choices(runs, sampled) == _choices(tmp_path / "whole", sampled)
    assert protocol.tune(sampled, runs, _never) == expected


def test_a_dry_run_counts_what_is_done_and_writes_nothing(sampled: Sweep, file: Path, runs: Path, capsys) -> None:
    asked = [str(file), *RANGE, f"+tune.sampler={sampled.sampler}", "--dry-run", "--runs", str(runs)]

    def shown() -> list[tuple[str, ...]]:
        before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
        assert command.main(asked) == 0
        assert {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()} == before
        return re.findall(r"(tune|confirm) +(\d+) runs, (\d+) done, (\d+) to train", capsys.readouterr().out)

    assert shown() == [("tune", "12", "0", "12"), ("confirm", "4", "0", "4")]
    with pytest.raises(KeyboardInterrupt):
        protocol.tune(sampled, runs, _trainer([], most=7))
    assert shown() == [("tune", "12", "7", "5"), ("confirm", "4", "0", "4")]
    chosen = protocol.tune(sampled, runs, _trainer([]))
    with pytest.raises(KeyboardInterrupt):
        protocol.confirm(sampled, runs, chosen, _trainer([], most=3))
    assert shown() == [("tune", "12", "12", "0"), ("confirm", "4", "3", "1")]


def test_optuna_reads_a_study_which_comes_out_again_where_it_is_lost(file: Path, runs: Path) -> None:
    optuna = pytest.importorskip("optuna")
    sweep = read(file, [*RANGE, "+tune.sampler=optuna"])
    chosen = protocol.tune(sweep, runs, _trainer([]))
    path = protocol.sweep_folder(runs, sweep) / study.STUDY
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    for cell in sweep.cells():
        name = f"projection={cell['projection']} {digest({'asks': study.asks(sweep, cell)})}"
        found = optuna.load_study(study_name=name, storage=storage)
        assert found.best_params == chosen[digest(cell)] and len(found.trials) == 6
        pruned = [trial.params["lr"] > 0.2 for trial in found.trials]
        assert [trial.state is optuna.trial.TrialState.PRUNED for trial in found.trials] == pruned
        assert found.direction is optuna.study.StudyDirection.MAXIMIZE
    path.unlink()
    assert protocol.tune(sweep, runs, _never) == chosen
    # and a damaged one is named
    path.write_bytes(path.read_bytes()[:200] + b"\n" + path.read_bytes()[200:])
    with pytest.raises(ExperimentError, match=r"study\.log must be the study as Optuna wrote it, got .* Move it away"):
        protocol.tune(sweep, runs, _never)


def test_a_sweep_that_is_changed_before_its_choice_asks_within_its_own_range(file: Path, runs: Path) -> None:
    pytest.importorskip("optuna")
    with pytest.raises(KeyboardInterrupt):
        protocol.tune(read(file, [*RANGE, "+tune.sampler=optuna"]), runs, _trainer([], most=7))
    narrow = read(file, ["tune.lr=[0.001,0.002]", "+tune.alpha=[4,8]", "+tune.sampler=optuna"])
    protocol.tune(narrow, runs, _trainer([]))
    points = [trial for choice in _choices(runs, narrow) for trial in choice["trials"]]
    assert len(points) == 2 * 4 and all(0.001 <= point["lr"] <= 0.002 and 4 <= point["alpha"] <= 8 for point in points)


def test_two_launchers_find_one_point(file: Path, runs: Path) -> None:
    pytest.importorskip("optuna")
    sweep = read(file, [*RANGE, "+tune.sampler=optuna"])
    cell = sweep.cells()[0]
    with ThreadPoolExecutor(4) as launchers:
        found = list(launchers.map(lambda _: study.points(sweep, cell, None, runs, 0), range(4)))
    assert found[0] == found[1] == found[2] == found[3] and len(found[0]) == 1


@pytest.mark.parametrize("sampler", ["random", "optuna"])
def test_lists_are_not_crossed_where_points_are_drawn(sampler: str, file: Path, runs: Path, monkeypatch) -> None:
    if sampler == "optuna":
        pytest.importorskip("optuna")
    monkeypatch.setattr(Sweep, "grid", None)
    lists = [f"+tune.{key}={[k / 100 for k in range(10)]}" for key in ("dropout", "warmup", "weight_decay")]
    sweep = read(file, ["tune.lr=[0.001,0.1]", *lists, f"+tune.sampler={sampler}", "+tune.trials=2"])
    protocol.tune(sweep, runs, _trainer([]))
    assert [len(choice["trials"]) for choice in _choices(runs, sweep)] == [2, 2]


@pytest.mark.parametrize("sampler", ["random", "optuna"])
def test_the_ends_of_a_range_are_checked_before_any_run(sampler: str, file: Path, runs: Path, capsys) -> None:
    """D = 2 layers x 2 modules x 4 (32 + 32) = 1,024; points between 64 and 1,100 are rarely above."""
    if sampler == "optuna":
        pytest.importorskip("optuna")
    for tuned, said in (("d=[64,1100]", "d must be at most D = 1024"), ("dropout=[0.0,1.01]", "dropout must lie in")):
        given = ["~settings.budget", "axes.projection=[unilora]", f"+tune.{tuned}", f"+tune.sampler={sampler}"]
        given += ["+tune.trials=1"] + (["+settings.d=64"] if tuned[0:2] != "d=" else [])
        assert command.main([str(file), *given, "--runs", str(runs)]) == 2
        assert said in capsys.readouterr().err and not runs.exists()


def test_a_loss_is_made_small(tmp_path: Path, llama: str, runs: Path) -> None:
    """Causal models are told apart by their loss: the study must look for the lowest."""
    optuna = pytest.importorskip("optuna")
    (tmp_path / "sums").mkdir()
    rows = "".join(json.dumps({"prompt": f"{k} + 1 =", "completion": f" {k + 1}"}) + "\n" for k in range(40))
    for split in ("train", "validation", "test"):
        (tmp_path / "sums" / f"{split}.jsonl").write_text(rows)
    content = {
        "settings": {"task": str(tmp_path / "sums"), "model": llama, "projection": "unilora", "d": 64},
        "tune": {"seeds": [0], "lr": [0.01, 0.1], "sampler": "optuna"},
        "seeds": [1],
    }
    (tmp_path / "sums.yaml").write_text(json.dumps(content))
    sweep = read(tmp_path / "sums.yaml")
    (cell,) = sweep.cells()
    (point,) = study.points(sweep, cell, None, runs, 0)
    assert 0.01 <= point["lr"] <= 0.1
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(runs / study.STUDY)))
    (summary,) = optuna.get_all_study_summaries(storage)
    assert summary.direction is optuna.study.StudyDirection.MINIMIZE


def test_rates_are_drawn_evenly_by_factor_and_lists_evenly(file: Path) -> None:
    tuned = ["tune.lr=[0.001,1.0]", "+tune.alpha=[1,3]", "+tune.dropout=[0.0,0.2]", "+tune.scheduler=[linear,cosine,constant]"]  # fmt: skip  # noqa: E501
    sweep = read(file, [*tuned, "+tune.sampler=random", "+tune.trials=2000"])
    points = study.expected(sweep, sweep.cells()[0])
    assert len(points) == 2000
    assert stats.kstest([math.log10(p["lr"]) for p in points], "uniform", (-3, 3)).pvalue > 1e-3
    assert stats.kstest([p["dropout"] for p in points], "uniform", (0, 0.2)).pvalue > 1e-3
    # integers as their logarithms: k has the share log((k + 1) / k) of log(4)
    shares = [2000 * math.log2((k + 1) / k) / 2 for k in (1, 2, 3)]
    assert stats.chisquare([sum(p["alpha"] == k for p in points) for k in (1, 2, 3)], shares).pvalue > 1e-3
    counts = [sum(p["scheduler"] == name for p in points) for name in ("linear", "cosine", "constant")]
    assert sum(counts) == 2000 and stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("sampler", ["random", "optuna"])
def test_as_many_points_as_the_grid_has_where_no_number_is_given(sampler: str, file: Path, runs: Path, capsys) -> None:
    if sampler == "optuna":
        pytest.importorskip("optuna")
    overrides = ["tune.lr=[0.01,0.03,0.1]", "+tune.alpha=[4,8]", f"+tune.sampler={sampler}"]
    sweep = read(file, overrides)
    assert sweep.points_per_cell == 3 * 2 and sweep.size == 2 * (3 * 2 + 2)
    assert command.main([str(file), *overrides, "--dry-run", "--runs", str(runs)]) == 0
    out = capsys.readouterr().out
    assert "12 runs, 0 done" in out and "beyond" not in out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+tune.sampler=best"], "tune.sampler must be one of grid, random, optuna, got 'best'"),
        (["+tune.sampler=random", "+tune.trials=0"], "tune.trials must be positive, got 0"),
        (["+tune.sampler=random", "+tune.trials=few"], "tune.trials must be an integer, got 'few'"),
        (["+tune.trials=3"], "tune.trials must be left to the lists of the grid, all of whose points are tried, got 3"),
        (["+tune.sampler=random", "+tune.trials=6000"], "at most 10,000 runs, got 12,004"),
    ],
)
def test_what_no_sampler_can_do_is_refused(overrides: list[str], message: str, file: Path) -> None:
    with pytest.raises(ExperimentError, match=message):
        read(file, overrides)


def test_a_missing_optuna_is_named_before_any_run(file: Path, runs: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    for more in ([], ["--dry-run"]):
        assert command.main([str(file), "+tune.sampler=optuna", *more, "--runs", str(runs)]) == 2
        assert "Run `pip install optuna`, or choose grid or random" in capsys.readouterr().err and not runs.exists()


@pytest.mark.parametrize("changed", [[], ["+tune.sampler=random", "+tune.trials=7"]], ids=["grid", "more"])
def test_another_sampler_or_number_is_another_sweep(changed: list[str], file: Path, runs: Path) -> None:
    grid = "tune.lr=[0.001,0.1]"
    protocol.tune(read(file, [grid, "+tune.sampler=random", "+tune.trials=6"]), runs, _trainer([]))
    with pytest.raises(ExperimentError, match="changed after its choice was locked"):
        protocol.tune(read(file, [grid, *changed]), runs, _never)
