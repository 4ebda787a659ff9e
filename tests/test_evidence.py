"""What is committed of the studies says one thing: records, tables, figures and docs/evidence.md.

The numbers of the document are worked out from the records with SciPy alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments.names import mapping
from experiments.records import statistics
from paper_figures.committed import Committed
from paper_figures.comparison import score
from paper_figures.report.collect import REFERENCE

ROOT = Path(__file__).parent.parent
SWEEPS = sorted(path.parent.name for path in ROOT.glob("results/sweeps/*/records.csv"))
PROJECTIONS = {label: name for name, label in mapping("methods").items()}
TASKS = {label: name for name, label in mapping("tasks").items()}


def _parts(sweep: str) -> list[Path]:
    """The folders of a sweep, or of the parts in which it was run."""
    places = [ROOT / "results" / "sweeps" / sweep, *sorted(ROOT.glob(f"results/sweeps/{sweep}_*"))]
    return [place for place in places if place.is_dir()]


def _records(sweep: str) -> pd.DataFrame:
    return pd.concat([pd.read_csv(part / "records.csv") for part in _parts(sweep)], ignore_index=True)


@pytest.mark.parametrize("sweep", SWEEPS)
def test_summaries_and_differences_are_those_of_the_records(sweep: str) -> None:
    folder = ROOT / "results" / "sweeps" / sweep
    records = pd.read_csv(folder / "records.csv")
    committed = pd.read_csv(folder / "summary.csv").set_index("cell")
    trained = records[records["failed"].isna() & records["did_not_train"].isna()].groupby("cell")["score"]
    pd.testing.assert_series_equal(committed["score"], trained.mean().reindex(committed.index), rtol=1e-12)
    pd.testing.assert_series_equal(
        committed["score_sd"], trained.std().reindex(committed.index), rtol=1e-9, check_names=False
    )
    assert (folder / "summary.csv").read_text() == statistics.summary(records).to_csv(index=False)
    pairs, again = pd.read_csv(folder / "paired.csv"), statistics.differences(records, REFERENCE)
    shared = [key for key in pairs if key in again and key != "reference"]
    pd.testing.assert_frame_equal(pairs[shared], again[shared], check_dtype=False, rtol=1e-12)


def test_a_run_that_did_not_train_is_in_no_mean_anywhere() -> None:
    """VB-LoRA on QNLI, whose loss moved on one seed of five."""
    own = _records("glue_budget")
    own = own[(own["projection"] == "vblora") & (own["task"] == "glue/qnli")]
    is_stuck = own["did_not_train"].notna()
    mean = own.loc[~is_stuck, "score"].mean()
    assert (len(own), is_stuck.sum()) == (5, 4) and abs(mean - own["score"].mean()) > 0.01
    summary = pd.read_csv(ROOT / "results/sweeps/glue_budget_qnli/summary.csv").set_index(["projection", "task"])
    sweep = Committed(ROOT / "results").sweep("glue_budget")
    assert sweep is not None
    cell = sweep.cells.set_index(["projection", "task"]).loc[("vblora", "glue/qnli")]
    kept = summary.loc[("vblora", "glue/qnli")]
    assert kept["score"] == cell["score"] == pytest.approx(mean)
    assert (kept["n"], kept["did_not_train"]) == (cell["n"], cell["did_not_train"]) == (1, 4)
    for seed, reason in zip(own.loc[is_stuck, "train_seed"], kept["stuck"].split("; "), strict=True):
        assert reason.startswith(f"train_seed {seed}: the loss went from")
    assert score(cell).text == "only 1 of 5 trained"


def _tables() -> dict[str, list[dict[str, str]]]:
    """The rows of each table of docs/evidence.md, by the heading above it."""
    found: dict[str, list[dict[str, str]]] = {}
    heading, heads = "", None
    for line in (ROOT / "docs" / "evidence.md").read_text().splitlines():
        if line.startswith("## "):
            heading = line[3:]
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else None
        if cells is None or set(line) <= set("|-"):
            heads = None if cells is None else heads
        elif heads is None:
            heads = cells
        else:
            found.setdefault(heading, []).append(dict(zip(heads, cells, strict=True)))
    return found


def _projection(row: Mapping[str, str]) -> str | None:
    label = next(iter(row.values()))
    return PROJECTIONS.get(re.sub(r" \(.*\)$", "", label))


def _spread(values: Sequence[float] | pd.Series) -> float:
    return float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))


def _mean(values: pd.Series, text: str, digits: int) -> None:
    """`79.2 ± 0.9`, or the mean alone."""
    expected = f"{values.mean():.{digits}f}" + (f" ± {_spread(values):.{digits}f}" if "±" in text else "")
    assert text == expected


def _score(own: pd.DataFrame, text: str) -> None:
    """The mean in points, or how many runs trained where not all did."""
    scores = 100 * own[own["did_not_train"].isna()]["score"]
    if len(scores) == len(own):
        _mean(scores, text, 1)
    else:
        assert text == (f"{len(scores)} of {len(own)} trained" if len(scores) else "did not train")


def _difference(own: pd.DataFrame, other: pd.DataFrame, key: str, scale: float, text: str, digits: int) -> None:
    """`+1.6 [+0.2, +3.0]`, or the difference alone."""
    both = own.merge(other, on="train_seed")
    gaps = scale * (both[f"{key}_x"] - both[f"{key}_y"])
    ends = [gaps.mean(), gaps.mean() - _spread(gaps), gaps.mean() + _spread(gaps)]
    found = [float(number) for number in re.findall(r"[+-]?\d+\.\d+", text)]
    assert len(gaps) == own["train_seed"].nunique() >= 3
    assert found == [pytest.approx(end, abs=0.5001 * 10**-digits) for end in ends[: len(found)]]


@pytest.mark.parametrize(
    ("heading", "sweep"),
    [
        ("GLUE at one budget", "glue_budget"),
        ("GSM8K, a model that can hardly do it", "gsm8k_budget"),
        ("Score against trained numbers", "score_against_d"),
        ("Score against the rank", "score_against_r"),
        ("Score against training rows", "score_against_rows"),
        ("Blocks of Uni-LoRA", "block_budget"),
    ],
)
def test_the_rates_at_the_edge_of_the_grid_are_counted(heading: str, sweep: str) -> None:
    section = (ROOT / "docs" / "evidence.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    (said,) = re.findall(r"(\d+) of (\d+) rates lie at the edge", section)
    choices = [each for part in _parts(sweep) for each in json.loads((part / "choice.json").read_text())["choices"]]
    tried = [{trial["lr"] for trial in each["trials"]} for each in choices]
    at_edge = sum(each["chosen"]["lr"] in (min(rates), max(rates)) for each, rates in zip(choices, tried, strict=True))
    assert (int(said[0]), int(said[1])) == (at_edge, len(choices))


def test_the_settings_of_glue_are_those_of_the_records() -> None:
    records = _records("glue_budget")
    rows = [row for row in _tables()["GLUE at one budget"] if "trained on" in row]
    assert {TASKS[row["task"]] for row in rows} == {*records["task"]}
    for row in rows:
        at = records[records["task"] == TASKS[row["task"]]]
        ((size, steps, together, rate, scored),) = (
            at[["train_size", "step", "batch_size", "head_lr", "rows"]].drop_duplicates().to_numpy()
        )
        assert row["trained on"] == f"{size:,.0f} rows, {steps:,.0f} steps of {together:.0f}"
        assert (row["rate of the head"], row["scored on"]) == (f"{rate:g}", f"{scored:,.0f} rows")


def test_the_table_of_glue_is_that_of_the_records() -> None:
    records, rows = _records("glue_budget"), _tables()["GLUE at one budget"]
    rows = [row for row in rows if "mean" in row]
    assert {_projection(row) for row in rows} == {*records["projection"], None}
    for row in rows:
        own = records[records["projection"] == _projection(row)]
        means = []
        for label, text in row.items():
            at = own[own["task"] == TASKS.get(label.split(",")[0])]
            if at.empty:
                continue
            _score(at, text)
            if at["did_not_train"].isna().all():
                means.append(100 * at["score"].mean())
        if len(own):
            assert row["mean"] == (f"{np.mean(means):.1f}" if len(means) == records["task"].nunique() else "")


def test_the_differences_of_uni_lora_are_those_of_the_records() -> None:
    records, rows = _records("glue_budget"), _tables()["Uni-LoRA beside each of them"]
    assert {_projection(row) for row in rows} == {*records["projection"]} - {"unilora"}
    for row in rows:
        for label, text in list(row.items())[1:]:
            at = records[records["task"] == TASKS[label]]
            own, other = (at[at["projection"] == name] for name in ("unilora", _projection(row)))
            if len(other) and pd.concat([own, other])["did_not_train"].isna().all():
                _difference(own, other, "score", 100.0, text, 1)
            else:
                assert not text


def test_the_claims_quote_what_stands_above_them() -> None:
    above, claims = (ROOT / "docs" / "evidence.md").read_text().split("## Claims of the paper\n")
    quoted = re.findall(r"[+-]?\d+\.\d \[[^]]*\]", claims)
    assert len(quoted) >= 10 and all(difference in above for difference in quoted)


def test_the_table_of_losses_is_that_of_the_records() -> None:
    records, rows = _records("gsm8k_budget"), _tables()["GSM8K, a model that can hardly do it"]
    assert {_projection(row) for row in rows} == set(records["projection"])
    for row in rows:
        own = records[records["projection"] == _projection(row)]
        _mean(own["validation"], row["mean"], 3)
        for label, name in (("minus LoRA", "lora"), ("minus Uni-LoRA", "unilora")):
            if _projection(row) != name:
                _difference(own, records[records["projection"] == name], "validation", 1.0, row[label], 3)


def test_the_table_of_blocks_is_that_of_the_records() -> None:
    records, rows = _records("block_budget"), _tables()["Blocks of Uni-LoRA"]
    assert {_projection(row) for row in rows} == set(records["projection"])
    for row in rows:
        own = records[records["projection"] == _projection(row)]
        if rate := re.search(r"\(rate (.*)\)", next(iter(row.values()))):  # another than the one that was chosen
            own = _records("block_rates")
            own = own[(own["projection"] == _projection(row)) & (own["lr"] == float(rate[1]))]
        _mean(100 * own["score"], row["SST-2, %"], 1)
        for label, name in (("minus LoRA", "lora"), ("minus Uni-LoRA", "unilora")):
            if _projection(row) != name and row[label]:
                _difference(own, records[records["projection"] == name], "score", 100.0, row[label], 1)


@pytest.mark.parametrize(
    ("heading", "sweep", "key"),
    [
        ("Score against trained numbers", "score_against_d", "trained"),
        ("Score against the rank", "score_against_r", "r"),
        ("Score against training rows", "score_against_rows", "train_size"),
    ],
)
def test_the_tables_of_scans_are_those_of_the_records(heading: str, sweep: str, key: str) -> None:
    records, rows = _records(sweep), _tables()[heading]
    lora = records[records["projection"] == "lora"]
    checked = 0
    for row in rows:
        for label, text in list(row.items())[1:]:
            size = int(re.findall(r"[\d,]+", label)[0].replace(",", ""))
            at = records[(records[key] - size).abs() <= (0.01 * size if key == "trained" else 0)]
            first = next(iter(row.values()))
            if not text:
                continue
            checked += 1
            if first.startswith("VeRA") and key == "trained":
                # its sizes are near those of the columns, and stand in its name
                sizes = [int(number.replace(",", "")) for number in re.findall(r"[\d,]+", first)]
                at = records[records[key] == min(sizes, key=lambda other: abs(np.log(other / size)))]
            if first.startswith("Uni-LoRA minus LoRA"):
                # of the same rows, or the largest LoRA
                base = lora[lora["train_size"] == size] if key == "train_size" else lora
                base = base[base["trained"] == base["trained"].max()]
                _difference(at[at["projection"] == "unilora"], base, "score", 100.0, text, 1)
            else:
                _score(at[at["projection"] == _projection(row)], text)
    assert checked >= 15
