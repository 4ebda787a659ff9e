"""The tables that are no comparison of scores: properties of each P, cost, scans of d and r, ablations, Fastfood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from experiments import names
from experiments.names import method, variant
from experiments.records.statistics import unit
from paper_figures.comparison import OURS, score
from paper_figures.published import claims
from paper_figures.sources import NOT_AVAILABLE, NOT_RUN, Sweep, complete, one_cell
from paper_figures.table import Table

ROUNDING = 1e-12
PROOFS = "What each property means and when it holds: docs/design.md, section 'When P is isometric'."
WORDS = {
    "isometric": "isometric: $max|P^T P - I|$",
    "uniform": "uniform: $max n - min n$",
    "global_sharing": "global: ratio",
}


def properties(cards: Sequence[Mapping[str, Any]], space: str) -> Table:
    """What each class claims and what a small instance measures."""
    rows = []
    for card in cards:
        measured = {verdict["claim"]: verdict for verdict in card["verdicts"]}
        expected = "yes" if "isometric_in_expectation" in measured else "no"
        rows.append([method(card["name"]), card["name"], f"${card['formula']}$", f"${card['d_formula']}$", card["kind"],
                     *(_verdict(measured[claim]) for claim in WORDS), expected, card["source"]])  # fmt: skip
    notes = [
        f"Measured on {space}; holds / does not hold is decided by `uniproj.claims`, the function the tests use.",
        "Global: modules that a coordinate reaches over those that as many rows drawn at random would reach; "
        "coordinates that stay within one module are local at any ratio. "
        f"{PROOFS} The paper's own table of properties is not available to us.",
    ]
    heads = [
        "projection",
        "name",
        "$theta_D$",
        "$d$",
        "$P$",
        *WORDS.values(),
        "isometric in expectation (claimed)",
        "source",
    ]
    return Table("properties", "Properties of each projection", heads, rows, notes)


def measured(verdicts: pd.DataFrame | None, columns: pd.DataFrame | None) -> Table:
    """Isometry and sharing of every choice of hyperparameters, from `analysis.isometry` and `analysis.sharing`."""
    known = [list(table["variant"]) for table in (verdicts, columns) if table is not None]
    measured = list(dict.fromkeys(name for each in known for name in each)) or ["all"]
    first = {} if verdicts is None else verdicts.set_index("variant").to_dict("index")
    second = {} if columns is None else columns.set_index("variant").to_dict("index")
    rows = [[variant(name), *_isometry(first.get(name)), *_sharing(second.get(name))] for name in measured]
    heads = [
        "projection", "$D x d$", "isometric", "deciding number", "singular values", "coherence", "$D x d$ of sharing",
        "modules per coordinate", "rows per coordinate", "coordinates per row", "reaches A and B, %",
    ]  # fmt: skip
    notes = [
        "Verdict and numbers: analysis.isometry and analysis.sharing, n = 1 seed, 12 seeds for 'in expectation'. "
        "Coherence: the largest absolute cosine of two columns."
    ]
    return Table("measured_properties", "Measured properties of each projection", heads, rows, notes)


def _isometry(row: Mapping[str, Any] | None) -> list[str]:
    if row is None or pd.isna(row["sigma_min"]):
        return [NOT_RUN] * 5
    coherence = "not measured" if pd.isna(row["coherence"]) else _small(row["coherence"])
    spread = f"{_small(row['sigma_min'])} to {_small(row['sigma_max'])}"
    return [
        f"{row['D']:,.0f} x {row['d']:,.0f}",
        row["verdict"],
        f"${row['what']} = {_small(row['number'])}$",
        spread,
        coherence,
    ]


def _sharing(row: Mapping[str, Any] | None) -> list[str]:
    if row is None or pd.isna(row["n_min"]):
        return [NOT_RUN] * 5
    return [
        f"{row['D']:,.0f} x {row['d']:,.0f}", f"{row['modules_per_column']:.3g}",
        f"{row['n_min']:.0f} to {row['n_max']:.0f}", f"{row['row_min']:.0f} to {row['row_max']:.0f}",
        f"{100 * row['A_and_B']:.0f}",
    ]  # fmt: skip


def _small(value: float) -> str:
    """Three digits; rounding, which differs from machine to machine, is 0."""
    return f"{value if abs(value) > ROUNDING else 0:.3g}"


def _verdict(verdict: Mapping[str, Any]) -> str:
    word = "yes" if verdict["holds"] else "no"
    return f"{word}: {verdict['value']:.3g}" + ("" if verdict["claimed"] or not verdict["holds"] else ", not claimed")


def training_cost(published: pd.DataFrame, model: pd.DataFrame | None) -> Table:
    """PEFT's benchmark, then ours per base."""
    values = published[published["table"] == "training_cost"]
    columns = list(dict.fromkeys(zip(values["column"], values["unit"], strict=True)))
    rows = []
    for label, own in values.groupby("method", sort=False):
        found = own.set_index("column")["value"]
        rows.append(["published", label, own["trained"].iloc[0], *(f"{found[column]:g}" for column, _ in columns)])
    if model is None:
        rows.append(["ours", "all", NOT_RUN, *[NOT_RUN] * len(columns)])
    else:
        for row in model.itertuples():
            rows.append([f"ours, {names.model(row.base)}, CPU", method(row.method), _whole(row.trained), NOT_RUN,
                         _ratio(row, "step_ratio"), _scaled(row.peak_bytes, 2**30),
                         _scaled(row.file_bytes, 1e6)])  # fmt: skip
    notes = [
        *(f"Published: {source}." for source in sorted(set(values["source"]))),
        "Ours: median of paired ratios with its 95 % interval; peak memory of a training step beyond the bare base. "
        "The published memory is all that the process reserved. n is in results/overhead.",
    ]
    heads = ["block", "method", "trained", *(f"{column}, {unit}" for column, unit in columns)]
    return Table("training_cost", "Cost of training", heads, rows, notes)


def _whole(value: float) -> str:
    return "not measured" if pd.isna(value) else f"{int(value):,}"


def _scaled(value: float, unit: float) -> str:
    return "not measured" if pd.isna(value) else f"{value / unit:.3g}"


def _ratio(row: Any, key: str) -> str:
    middle, low, high = (getattr(row, name) for name in (key, f"{key}_low", f"{key}_high"))
    return "not measured" if pd.isna(middle) else f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def scan(name: str, title: str, key: str, head: str, published: pd.DataFrame, sweep: Sweep | None) -> Table:
    """Score against a setting or size: published points, then every cell of ours."""
    values = published[published["table"] == name]
    rows = [
        ["published", value["method"], _whole(value["d" if key == "trained" else key]), value["column"],
         f"{value['value']:g}"]
        for value in values.to_dict("records")
    ] or [["published", "all", *[NOT_AVAILABLE] * 3]]  # fmt: skip
    if sweep is None:
        rows.append(["ours", "all", NOT_RUN, NOT_RUN, NOT_RUN])
    else:
        complete(sweep.cells, key)
        for _, cell in sweep.cells.sort_values(["projection", key], kind="stable").iterrows():
            rows.append(
                [f"ours, {names.model(cell['model'])}", method(cell["projection"]), _whole(cell[key]),
                 names.task(cell["task"]), score(cell).text]
            )  # fmt: skip
    notes = [f"Published: {source}." for source in sorted(set(values["source"]))] + [OURS]
    return Table(name, title, ["block", "method", head, "task", _head(sweep)], rows, notes)


def _head(sweep: Sweep | None) -> str:
    """Of scores: published accuracies, and ours of one task."""
    return f"score: {unit('accuracy' if sweep is None else sweep.cells['metric'].dropna().iloc[0])}"


def _tasks(sweep: Sweep | None) -> dict[str, str]:
    """The tasks of a sweep, and the heading of their scores."""
    metrics = (
        {} if sweep is None else sweep.cells.dropna(subset=["metric"]).groupby("task", sort=False)["metric"].first()
    )
    return {task: f"{names.task(task)}, {unit(metric)}" for task, metric in dict(metrics).items()}


def intrinsic(d90: pd.DataFrame | None) -> Table:
    """d90 of each method, from `analysis.intrinsic_dimension`."""
    rows = [] if d90 is None else [
        [f"{names.task(row.task)}, {names.model(row.model)}", method(row.projection), _end(row.d90),
         "not reached" if pd.isna(row.low) else f"{_end(row.low)} to {_end(row.high)}",
         f"{100 * row.reached:.0f}", str(row.sizes), str(row.seeds),
         "yes" if row.smallest else "no"]
        for row in d90.itertuples()
    ]  # fmt: skip
    heads = ["task and model", "method", "d90", "95 % interval", "draws that reach it, %", "sizes", "seeds",
             "already its smallest size"]  # fmt: skip
    notes = ["d90: trained numbers that reach 90 % of LoRA's gain over the most frequent label; bootstrap over seeds. "
             "Where already the smallest size reaches it, d90 is an upper bound. The paper states none."]  # fmt: skip
    title = "Intrinsic dimension of each method"
    return Table("intrinsic_dimension", title, heads, rows or [["ours", "all", *[NOT_RUN] * (len(heads) - 2)]], notes)


def _end(value: float) -> str:
    return "not reached" if pd.isna(value) else _whole(value)


def ablations(sweep: Sweep | None, differences: pd.DataFrame, ablated: Sequence[str], reference: str) -> Table:
    """Score of each ablation, and its paired difference to Uni-LoRA's, by task."""
    tasks = _tasks(sweep)
    rows = [["published", method(name), *[NOT_AVAILABLE] * max(1, len(tasks))] for name in (reference, *ablated)]
    if sweep is None:
        rows += [["ours", method(name), NOT_RUN] for name in (reference, *ablated)]
    else:
        for name in (reference, *ablated):
            chosen = sweep.cells[sweep.cells["projection"] == name]
            cells = [one_cell(chosen[chosen["task"] == task], f"{name} on {task}") for task in tasks]
            rows.append(["ours, score", method(name), *(score(cell).text for cell in cells)])
        for name in ablated:
            own = differences[differences["projection"] == name].set_index("task")
            gaps = [_gap(own.loc[task]) if task in own.index else NOT_RUN for task in tasks]
            rows.append([f"ours, difference to {method(reference)}", method(name), *gaps])
    notes = [f"Published without numbers: {claim}." for claim in claims("ablations")]
    notes += [OURS, "Differences are paired by seed, x 100, with Student's 95 % interval."]
    heads = ["block", "projection", *(tasks.values() or [_head(None)])]
    return Table("ablations", "Local, non-uniform and unnormalised partitions", heads, rows, notes)


def _gap(row: pd.Series) -> str:
    return (
        f"{100 * row['difference']:+.1f} [{100 * row['t_low']:+.1f}, {100 * row['t_high']:+.1f}] (n = {row['pairs']})"
    )


def fastfood(sweep: Sweep | None, model: pd.DataFrame | None, methods: Sequence[str]) -> Table:
    """Score, time and memory of Fastfood and Uni-LoRA."""
    tasks = _tasks(sweep)
    bases = [] if model is None else list(model.groupby("base", sort=False))
    unknown = [NOT_AVAILABLE] * (max(1, len(tasks)) + 2 * max(1, len(bases)))
    rows = [["published", method(name), *unknown] for name in methods]
    for name in methods:
        scores = [NOT_RUN]
        if sweep is not None:
            own = sweep.cells[sweep.cells["projection"] == name]
            scores = [score(one_cell(own[own["task"] == task], f"{name} on {task}")).text for task in tasks]
        costs = [NOT_RUN, NOT_RUN] if model is None else []
        for _, part in bases:
            found = [[_ratio(row, "step_ratio"), _scaled(row.peak_bytes_per_coordinate_beyond_lora, 1)]
                     for row in part[part["method"] == name].itertuples()]  # fmt: skip
            costs += found[0] if found else [NOT_RUN, NOT_RUN]
        rows.append(["ours", method(name), *scores, *costs])
    heads = ["block", "projection", *(tasks.values() or [_head(None)])]
    for base in [names.model(base) for base, _ in bases] or ["a model"]:
        heads += [f"step / LoRA, {base}", f"peak - LoRA's, {base}, B per coordinate"]
    notes = [f"Published without numbers: {claim}." for claim in claims("fastfood")]
    notes += [OURS, "Step time: median of paired ratios to PEFT's LoRA, with its 95 % interval."]
    return Table("fastfood", "Fastfood beside Uni-LoRA: score, time, memory", heads, rows, notes)
