"""Reading records: what is not comparable, not finite or not there stops with a sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import uniproj
from experiments.errors import ExperimentError
from experiments.records import gather, statistics
from paper_figures.report.collect import payload
from tests.sweeps import made_up, write, write_run

TASKS, METHODS = ["glue/sst2", "glue/stsb"], ["lora", "unilora", "vera"]


@pytest.fixture
def table() -> pd.DataFrame:
    return made_up(TASKS, METHODS)


def test_a_cell_is_the_mean_over_its_seeds_with_students_interval(table: pd.DataFrame, tmp_path: Path) -> None:
    write(tmp_path / "mine", table)
    cells = statistics.cells(gather.read(tmp_path).runs)
    assert len(cells) == len(TASKS) * len(METHODS) and set(cells["status"]) == {"complete"}
    cell = cells[(cells["task"] == TASKS[1]) & (cells["projection"] == "vera")].iloc[0]
    own = table[(table["task"] == TASKS[1]) & (table["projection"] == "vera")]["score"]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(own), scale=stats.sem(own))
    assert cell["n"] == 3 and cell["score"] == pytest.approx(np.mean(own))
    assert (cell["score_low"], cell["score_high"]) == pytest.approx((low, high))


@pytest.mark.parametrize(("metric", "ends"), [("accuracy", (0.0, 1.0)), ("Matthews", (-1.0, 1.0))])
def test_an_interval_ends_where_the_metric_does(metric: str, ends: tuple, table: pd.DataFrame, tmp_path: Path) -> None:
    """Student's interval of 0.05, 0.5, 0.95 is 0.5 -+ 1.1."""
    one = table[(table["task"] == TASKS[0]) & (table["projection"] == "lora")]
    write(tmp_path / "mine", one.assign(metric=metric, score=[0.05, 0.5, 0.95]))
    cell = statistics.cells(gather.read(tmp_path).runs).iloc[0]
    assert cell["score_low"] == pytest.approx(max(ends[0], -0.618), abs=1e-3) and cell["score_high"] == 1.0


def test_differences_pair_the_seeds(table: pd.DataFrame, tmp_path: Path) -> None:
    write(tmp_path / "mine", table)
    found = statistics.differences(gather.read(tmp_path).runs, "lora")
    one = found[(found["task"] == TASKS[0]) & (found["projection"] == "unilora")].iloc[0]
    wide = table[table["task"] == TASKS[0]].pivot(index="train_seed", columns="projection", values="score")
    gaps = wide["unilora"] - wide["lora"]
    assert one["pairs"] == 3 and one["difference"] == pytest.approx(gaps.mean())
    assert one["t_low"] == pytest.approx(stats.t.interval(0.95, 2, loc=gaps.mean(), scale=stats.sem(gaps))[0])


def test_of_several_sizes_of_the_reference_the_largest_is_subtracted(table: pd.DataFrame, tmp_path: Path) -> None:
    again = table[table["projection"] == "lora"].assign(r=8, trained=73728, score=0.5)
    write(tmp_path / "mine", pd.concat([table, again.assign(folder=again["folder"] + "8")]))
    found = statistics.differences(gather.read(tmp_path).runs, "lora")
    assert len(found) == 4 and set(found["reference_trained"]) == {73728}
    one = found[(found["task"] == TASKS[0]) & (found["projection"] == "unilora")].iloc[0]
    own = table[(table["task"] == TASKS[0]) & (table["projection"] == "unilora")]["score"]
    assert one["difference"] == pytest.approx(own.mean() - 0.5)


@pytest.mark.parametrize(("axis", "values"), [("dropout", [0.0, 0.5]), ("projection_seed", [7, 8])])
def test_cells_that_differ_in_an_axis_are_not_pooled_as_seeds(axis: str, values: list, tmp_path: Path) -> None:
    runs = made_up(TASKS[:1], METHODS[:2])
    parts = [
        runs.assign(**{axis: value, f"cell.{axis}": value, "folder": runs["folder"] + str(value)}) for value in values
    ]
    parts[1]["score"] += 0.1 * (parts[1]["projection"] == "unilora")
    write(tmp_path / "mine", pd.concat(parts))
    found = gather.read(tmp_path).runs
    cells = statistics.cells(found)
    assert len(cells) == 4 and set(cells["n"]) == {3}
    gaps = statistics.differences(found, "lora").set_index(f"cell.{axis}" if "seed" in axis else axis)
    assert gaps.loc[values[1], "pairs"] == 3
    assert gaps.loc[values[1], "difference"] - gaps.loc[values[0], "difference"] == pytest.approx(0.1)


def test_a_run_that_two_sweeps_share_counts_in_both(tmp_path: Path) -> None:
    runs = made_up(TASKS[:1], METHODS[:2])
    runs["folder"] = [write_run(tmp_path, values) for values in runs.to_dict("records")]
    lora = runs["projection"] == "lora"
    for name, own in (("one", runs), ("two", runs[lora])):
        (tmp_path / "sweeps" / name).mkdir(parents=True)
        listed = own.assign(folder="elsewhere/" + own["folder"], cell=own["projection"])
        listed[["cell", "folder"]].to_csv(tmp_path / "sweeps" / name / "records.csv", index=False)
    found = gather.read(tmp_path)
    cells = statistics.cells(found.runs).set_index(["sweep", "projection"])
    assert dict(cells["n"]) == {("one", "lora"): 3, ("one", "unilora"): 3, ("two", "lora"): 3}
    assert set(cells["status"]) == {"complete"}
    assert {name: origin["runs"] for name, origin in found.origins.items()} == {"one": 6, "two": 3}


def test_a_run_of_two_cells_counts_once_in_each(tmp_path: Path) -> None:
    lora = made_up(TASKS[:1], ["lora"])
    write(tmp_path / "mine", pd.concat([lora.assign(cell=name) for name in ("at 4740", "at 9480")]))
    cells = statistics.cells(gather.read(tmp_path).runs)
    assert list(cells["n"]) == [3, 3]


def test_a_cell_with_a_failed_stuck_or_missing_run_is_not_complete(table: pd.DataFrame, tmp_path: Path) -> None:
    table.loc[0, "failed"] = "out of memory"
    table.loc[3, "did_not_train"] = "the loss went from 0.7 to 0.7"
    write(tmp_path / "mine", table.drop(index=6))
    cells = statistics.cells(gather.read(tmp_path).runs)
    first = cells[cells["task"] == TASKS[0]].set_index("projection")["status"]
    assert dict(first) == {"lora": "incomplete", "unilora": "did not train", "vera": "incomplete"}


def test_a_score_that_is_no_number_stops_with_a_sentence(table: pd.DataFrame, tmp_path: Path) -> None:
    table.loc[4, "score"] = np.nan
    folder = write(tmp_path / "mine", table)
    message = "a finite number that accuracy can have, got nan in glue-sst2/unilora-012 of"
    with pytest.raises(ExperimentError, match=message):
        gather.read_sweep(folder)


def test_two_metrics_of_one_task_stop_with_a_sentence(table: pd.DataFrame, tmp_path: Path) -> None:
    table.loc[4, "metric"] = "Matthews"
    write(tmp_path / "mine", table)
    with pytest.raises(ExperimentError, match="must have one metric, got Matthews, accuracy"):
        gather.read(tmp_path)


def test_a_lost_run_stops_with_a_sentence(table: pd.DataFrame, tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", table)
    table.drop(index=2).to_csv(folder / "records.csv", index=False)
    with pytest.raises(ExperimentError, match="must hold the 18 runs that its provenance counts, got 17"):
        gather.read(tmp_path)


def test_a_lost_curve_stops_with_a_sentence(table: pd.DataFrame, tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", table)
    curves = pd.read_csv(folder / "curves.csv")
    curves[curves["folder"] != table["folder"][7]].to_csv(folder / "curves.csv", index=False)
    with pytest.raises(ExperimentError, match=f"the curve of every run, got none of {table['folder'][7]}"):
        gather.read(tmp_path)


def test_nothing_to_read_stops_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="must hold runs scored on a test split"):
        gather.read(tmp_path)
    with pytest.raises(ExperimentError, match="must be a folder, got none"):
        gather.read(tmp_path / "nowhere")


def test_the_score_of_one_part_of_the_test(table: pd.DataFrame) -> None:
    table["groups"] = [json.dumps({"gsm8k": k / 100, "math500": 0.0}) for k in range(len(table))]
    part = statistics.of_group(table, "gsm8k")
    assert list(part["score"]) == [k / 100 for k in range(len(table))]
    assert statistics.of_group(table, "nothing").empty


def test_a_mean_curve_has_the_steps_of_every_run(table: pd.DataFrame, tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", table)
    curves = pd.read_csv(folder / "curves.csv")
    curves = curves[~((curves["folder"] == table["folder"][0]) & (curves["step"] == 30))]
    cells = statistics.cells(table.assign(sweep="mine"))
    mean = statistics.mean_curves(cells, curves)
    own = mean[mean["cell"] == cells.index[cells["projection"] == "lora"][0]]
    runs = table["folder"][:3]
    expected = curves[curves["folder"].isin(runs) & (curves["step"] == 20)]["loss"].mean()
    assert list(own["step"]) == [10, 20] and own["loss"].iloc[1] == pytest.approx(expected)


def test_runs_of_fewer_steps_than_a_logged_loss_have_no_curve(table: pd.DataFrame, tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", table.assign(step=8))
    (folder / "curves.csv").write_text("folder,step,loss\n")
    assert gather.read(tmp_path).curves.empty
    write(tmp_path / "mine", table.assign(step=10))
    (folder / "curves.csv").write_text("folder,step,loss\n")
    with pytest.raises(ExperimentError, match="the curve of every run"):
        gather.read(tmp_path)


def _as_runs(folder: Path, table: pd.DataFrame, sweep: str | None) -> None:
    """The same runs as they were trained: a folder each, JSON without NaN, and the tables of their sweep."""
    table = table.assign(folder=[write_run(folder, values) for values in table.to_dict("records")])
    if sweep is not None:
        (folder / "sweeps" / sweep).mkdir(parents=True)
        listed = table[["folder", *(key for key in table if key.startswith("cell"))]]
        listed.to_csv(folder / "sweeps" / sweep / "records.csv", index=False)


@pytest.mark.parametrize("sweep", ["mine", None])
def test_a_folder_of_runs_and_an_exported_sweep_give_one_table(
    sweep: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA has no d and no budget, which JSON and CSV write in different ways; nothing has test_size."""
    monkeypatch.setattr(uniproj, "names", lambda: ["lora"])
    table = made_up(TASKS, METHODS).assign(test_size=None, target_modules=None)
    table.loc[table["projection"] == "lora", ["d", "budget"]] = None
    if sweep is not None:
        table["cell"] = table["task"] + table["projection"]
        table["cell.task"], table["cell.projection"] = table["task"], table["projection"]
    write(tmp_path / "exported" / (sweep or statistics.SINGLE), table)
    _as_runs(tmp_path / "runs", table, sweep)
    exported, trained = (payload(gather.read(tmp_path / name))["cells"] for name in ("exported", "runs"))
    # seeds are summed in the order of their folders
    assert exported == [pytest.approx(cell) for cell in trained] and len(trained) == 6
    for cell in trained:
        own, base = (
            table[(table["projection"] == name) & (table["task"] == TASKS[cell["task"] == "STS-B"])]["score"].to_numpy()
            for name in (cell["projection"], "lora")
        )
        wanted = None if cell["projection"] == "lora" else pytest.approx((own - base).mean())
        assert cell["gap_difference"] == wanted, cell


def test_the_page_calls_own_tasks_by_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uniproj, "names", lambda: ["lora"])
    own = ["/home/me/one/reviews", "/home/me/two/reviews", "/home/me/mails"]
    table = made_up(own, METHODS, model="/home/me/small")
    table.loc[0, "failed"] = "out of memory"
    write(tmp_path / "mine", table)
    found = payload(gather.read(tmp_path))
    assert {cell["task"] for cell in found["cells"]} == {"one/reviews", "two/reviews", "mails"}
    assert {cell["model"] for cell in found["cells"]} == {"small"} and len(found["cells"]) == 9
    assert "/home/me" not in json.dumps({key: found[key] for key in ("cells", "failures", "curves")})


DAMAGE = {
    "a result of zeros": (lambda place: (place / "result.json").write_bytes(bytes(512)), "must be whole JSON", True),
    "a score of 99": (lambda place: _edit(place / "result.json", score=99), r"must lie in [0, 1], got 99", True),
    "another rate": (lambda place: _edit(place / "result.json", "config", lr=9.0), "whose hash the folder bears", True),
    "an edited configuration": (lambda place: _edit(place / "config.json", lr=9.0), "It was edited", False),
    "a configuration of zeros": (lambda place: (place / "config.json").write_bytes(bytes(9)), "whole JSON", False),
    "a result that is a pipe": (lambda place: _pipe(place / "result.json"), "must be a regular file", True),
    "no result": (
        lambda place: _edit(place / "config.json", unlink=place / "result.json"),
        "named after its hash",
        False,
    ),
}


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _edit(path: Path, *inside: str, unlink: Path | None = None, **values: object) -> None:
    content = json.loads(path.read_text())
    (content[inside[0]] if inside else content).update(values or {"lr": 9.0})
    path.write_text(json.dumps(content))
    if unlink is not None:
        unlink.unlink()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_is_told_beside_the_others(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uniproj, "names", lambda: ["lora"])
    table = made_up(TASKS[:1], METHODS[:2])
    folders = [write_run(tmp_path, values) for values in table.to_dict("records")]
    spoil, reason, is_known = DAMAGE[damage]
    spoil(tmp_path / folders[0])
    found = payload(gather.read(tmp_path))
    (told,) = found["failures"]
    assert told["kind"] == "damaged" and told["folder"] == folders[0] and reason in told["reason"]
    cells = {cell["projection"]: (cell["status"], cell["n"]) for cell in found["cells"]}
    # where its settings can be known, its cell says that one is lost
    assert cells == {"lora": ("incomplete", 2) if is_known else ("complete", 2), "unilora": ("complete", 3)}


def test_damaged_tables_of_a_sweep_are_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uniproj, "names", lambda: ["lora"])
    write(tmp_path / "good", made_up(TASKS[:1], METHODS[:2]))
    (write(tmp_path / "bad", made_up(TASKS[:1], METHODS[:2])) / "provenance.json").write_bytes(bytes(64))
    _pipe(write(tmp_path / "pipe", made_up(TASKS[:1], METHODS[:2])) / "records.csv")
    (tmp_path / "overhead").mkdir()
    (tmp_path / "overhead" / "overhead-model.csv").write_text("a\n1\n")
    found = payload(gather.read(tmp_path))
    assert {cell["sweep"] for cell in found["cells"]} == {"good"}
    assert [(each["folder"], each["kind"]) for each in found["failures"]] == [
        ("bad", "damaged"),
        ("pipe", "damaged"),
        ("overhead/overhead-model.csv", "damaged"),
    ]
