"""What is committed of a sweep: every run, its curve and checksum, and no path of the machine."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from experiments import export
from experiments.records.committed import without_paths
from experiments.records.gather import read, read_sweep
from experiments.records.reading import load
from experiments.runs.folder import lock, prepare


@pytest.fixture
def copied(swept: tuple[Path, Path], runs: Path) -> Path:
    """The runs of a sweep, to be changed."""
    return Path(shutil.copytree(swept[1], runs))


def test_an_exported_sweep_holds_what_the_runs_hold(swept: tuple[Path, Path], tmp_path: Path) -> None:
    trained = swept[1]
    assert export.main(["mine", "--runs", str(trained), "--out", str(tmp_path / "kept")]) == 0
    folder = tmp_path / "kept" / "mine"
    committed, runs = read_sweep(folder), load(trained)
    runs = runs[runs["score_on"] == "test"].set_index(["projection", "train_seed"])
    for record in committed.runs.to_dict("records"):
        own = runs.loc[(record["projection"], record["train_seed"])]
        assert record["score"] == own["score"] and record["adapter_sha256"] == own["adapter_sha256"]
        assert record["cost_seconds"] == own["cost"]["seconds"]
        logged = [json.loads(line) for line in (Path(own["folder"]) / "metrics.jsonl").read_text().splitlines()]
        curve = committed.curves[committed.curves["folder"] == record["folder"]]
        assert list(curve["step"]) == [line["step"] for line in logged]
        assert list(curve["loss"]) == pytest.approx([line["loss"] for line in logged], rel=1e-4)
    origin = committed.origins["mine"]
    assert set(origin["adapters"].values()) == set(runs["adapter_sha256"]) and origin["hardware"][0]["cores"]
    assert str(trained) not in "".join(path.read_text() for path in folder.iterdir())

    # the folders of the runs themselves say the same
    live = read(trained)
    assert set(live.runs["sweep"]) == {"mine"}
    assert sorted(live.runs["score"]) == sorted(committed.runs["score"])
    pd.testing.assert_frame_equal(
        live.curves.sort_values(["folder", "step"], ignore_index=True),
        committed.curves.sort_values(["folder", "step"], ignore_index=True),
        rtol=1e-4,
    )

    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert export.main(["mine", "--runs", str(trained), "--out", str(tmp_path / "kept")]) == 0
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_tables_are_made_anew_from_the_records(copied: Path, tmp_path: Path) -> None:
    tables = copied / "sweeps" / "mine"
    (tables / "summary.csv").write_text("what another version wrote\n")
    (tables / "paired.csv").unlink()
    # so few steps may have taught nothing
    pd.read_csv(tables / "records.csv").assign(did_not_train=None).to_csv(tables / "records.csv", index=False)
    assert export.main(["mine", "--runs", str(copied), "--out", str(tmp_path / "kept")]) == 0
    summary, paired = (pd.read_csv(tmp_path / "kept" / "mine" / f"{name}.csv") for name in ("summary", "paired"))
    records = load(copied)
    scores = records[records["score_on"] == "test"].groupby("projection")["score"].mean()
    assert dict(summary.set_index("projection")["score"]) == pytest.approx(dict(scores))
    assert paired["difference"].item() == pytest.approx(scores["unilora"] - scores["lora"])
    assert paired[["rows_low", "rows_high"]].notna().all(axis=None)


def test_no_path_of_the_machine_is_committed_and_two_folders_of_one_name_stay_apart() -> None:
    records = pd.DataFrame(
        {"task": ["/a/one/reviews", "/a/two/reviews", "glue/sst2"], "model": "/models/small",
         "data": ["hub", "hub", "/a/d"],
         "plugins": ["[]", "['/home/me/mine.py']", "[]"]}
    )  # fmt: skip
    text = "/a/one/reviews,/a/two/reviews,glue/sst2,/models/small,\"['/home/me/mine.py']\",/a/d,3/4"
    assert without_paths(text, records) == "one/reviews,two/reviews,glue/sst2,small,\"['mine.py']\",d,3/4"


def test_a_sweep_that_is_not_there_is_named(runs: Path, tmp_path: Path, capsys) -> None:
    assert export.main(["other", "--runs", str(runs), "--out", str(tmp_path)]) == 2
    assert "finished sweeps: none" in capsys.readouterr().err


def test_a_run_that_is_not_done_is_told_from_one_that_is(copied: Path, config) -> None:
    waiting = prepare(copied, config.to_json())
    found = read(copied).runs.set_index("folder")["failed"]
    assert found["/".join(waiting.parts[-2:])] == "not started" and found.isna().sum() == 4
    held = lock(waiting)
    assert held is not None and "still training" in set(read(copied).runs["failed"])
    held.close()
    assert "did not finish: start the same command again" in set(read(copied).runs["failed"])
