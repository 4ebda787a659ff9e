"""The table of a comparison (terminal, CSV) and its picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from experiments import names
from experiments.files import disk_errors, write_json, write_text
from experiments.records import baseline, statistics
from experiments.sweeps.report import beyond_budget

# Okabe and Ito's palette: told apart by colour-blind readers and in grey.
COLUMNS = (
    *("projection", "score", "score_sd", "score_low", "score_high", "validation", "n", "runs", "lr", "r", "trained"),
    *("budget_error", "isometry_error", "step_ratio", "step_ratio_low", "step_ratio_high", "adapter_bytes", "head"),
    *("did_not_train", "stuck", "ranked"),
)
REFERENCE_COLOUR, METHOD_COLOUR, MAJORITY_COLOUR = "#E69F00", "#0072B2", "#999999"


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per entrant, best first; one of which a run did not train is unranked and comes last.

    One that stands there several times bears the options in which its rows differ: `peft/fourierft (n_frequency=30)`.
    """
    runs = runs.assign(sweep=statistics.SINGLE, failed=None, projection=_told_apart(runs))
    cells = statistics.cells(runs)
    table = cells.assign(ranked=cells["status"] == statistics.COMPLETE)[list(COLUMNS)]
    table["beats_majority"] = table["projection"].map(baseline.beats(runs, "projection"))
    return table.sort_values(["ranked", "score"], ascending=False, kind="stable", ignore_index=True)


def _told_apart(runs: pd.DataFrame) -> list[str]:
    names = list(runs["projection"])
    options = [{"r": run.get("r"), **run.get("hyperparameters", {})} for run in runs.to_dict("records")]
    found = []
    for name, own in zip(names, options, strict=True):
        twins = [other for other, its in zip(options, names, strict=True) if its == name]
        varied = [f"{key}={value}" for key, value in own.items() if any(twin.get(key) != value for twin in twins)]
        found.append(f"{name} ({', '.join(varied)})" if varied else name)
    return found


def as_text(table: pd.DataFrame, runs: pd.DataFrame, budget: int, remarks: Sequence[str] = ()) -> str:
    """The table for a terminal, with what its numbers mean below it, and remarks of the command's own."""
    first = runs.iloc[0]
    shown = pd.DataFrame(
        {
            "rank": [i + 1 if ranked else "-" for i, ranked in enumerate(table["ranked"])],
            "projection": table["projection"],
            f"test {statistics.unit(first['metric'])}": [_score(row) for row in table.itertuples()],
            "trained": table["trained"].map("{:,}".format),
            "budget error": table["budget_error"].map(lambda e: "own size" if pd.isna(e) else f"{e:+.1%}"),
            "max|PtP-I|": table["isometry_error"].map(lambda e: "not measured" if pd.isna(e) else f"{e:.1e}"),
            "step time / LoRA": [
                f"{t.step_ratio:.2f} [{t.step_ratio_low:.2f}, {t.step_ratio_high:.2f}]" for t in table.itertuples()
            ],
            "adapter bytes": table["adapter_bytes"].map(statistics.count),
        }
    )
    shown.iloc[:, 2] += baseline.marks(table["beats_majority"])
    notes = [*_notes(table, runs, budget), *remarks]
    return shown.to_string(index=False) + "\n\n" + "\n".join(notes) + "\n"


def _score(row: Any) -> str:
    return "none" if math.isnan(row.score) else statistics.percent(row.score, row.score_low, row.score_high)


def _notes(table: pd.DataFrame, runs: pd.DataFrame, budget: int) -> list[str]:
    first = runs.iloc[0]
    notes = [
        f"{first['model']} on {first['task']}: {first['rows']:,} test rows, majority class "
        f"{100 * first['majority']:.1f} %, {table['runs'].max()} seed(s). Budget {budget:,} trained numbers; "
        f"the head's {first['head']:,} ({first['head_bytes']:,} bytes) are counted apart.",
        "lora is the reference. Own size: no budget was solved for it. Scores: mean over the seeds that trained, "
        "Student's 95 % interval. "
        "Step time: median of paired steps beside PEFT's LoRA at the same rank, 95 % interval.",
        baseline.RULE,
    ]
    stuck = table[~table["ranked"].astype(bool)]
    return [
        *notes,
        *beyond_budget(table),
        *(
            f"{row.projection} did not train ({row.stuck}) and is not ranked. Try --lr auto."
            for row in stuck.itertuples()
        ),
    ]


def draw(table: pd.DataFrame, runs: pd.DataFrame, path: Path) -> None:
    """Test metric and relative step time of every ranked projection, best on top."""
    ranked = table[table["ranked"]].iloc[::-1].reset_index(drop=True)
    first = runs.iloc[0]
    figure, (scores, times) = plt.subplots(
        1, 2, figsize=(11, 1.8 + 0.42 * len(ranked)), sharey=True, width_ratios=(3, 2), layout="constrained"
    )
    colours = [REFERENCE_COLOUR if p == "lora" else METHOD_COLOUR for p in ranked["projection"]]
    _draw_scores(scores, ranked, first, colours)
    middle = ranked["step_ratio"]
    interval = [middle - ranked["step_ratio_low"], ranked["step_ratio_high"] - middle]
    times.errorbar(middle, ranked.index, xerr=interval, fmt="none", ecolor=MAJORITY_COLOUR, capsize=3, zorder=1)
    times.scatter(middle, ranked.index, c=colours, zorder=2)
    times.axvline(1.0, color=MAJORITY_COLOUR, linestyle="--", linewidth=1)
    times.set_xlabel("step time / PEFT LoRA at the same rank\n(median, 95 % interval)")
    times.grid(axis="x", alpha=0.3)
    with disk_errors(path):
        figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_scores(axes: Axes, ranked: pd.DataFrame, first: pd.Series, colours: list[str]) -> None:
    score = 100 * ranked["score"]
    error = [score - 100 * ranked["score_low"], 100 * ranked["score_high"] - score]
    axes.errorbar(score, ranked.index, xerr=error, fmt="none", ecolor=MAJORITY_COLOUR, capsize=3, zorder=1)
    axes.scatter(score, ranked.index, c=colours, zorder=2)
    axes.axvline(100 * first["majority"], color=MAJORITY_COLOUR, linestyle="--", linewidth=1)
    axes.annotate(
        "majority class", (100 * first["majority"], 1), xycoords=("data", "axes fraction"), xytext=(3, 3),
        textcoords="offset points", fontsize=8, color="#555555",
    )  # fmt: skip
    labels = [f"{names.variant(row.projection)}  ({row.trained:,} numbers)" for row in ranked.itertuples()]
    axes.set_yticks(ranked.index, labels)
    seeds = int(ranked["n"].max()) if len(ranked) else 0
    bar = "95 % interval" if seeds > 1 else "one has no interval"
    axes.set_xlabel(
        f"{names.task(first['task'])}, {names.model(first['model'])}: test {statistics.unit(first['metric'])}\n"
        f"(mean over n = {seeds} seed(s), {bar}; {first['rows']:,} rows)"
    )
    axes.grid(axis="x", alpha=0.3)


def write(folder: Path, runs: pd.DataFrame, budget: int, remarks: Sequence[str] = ()) -> None:
    """Print the table and the name of `folder`, where it is saved as text, CSV and PNG beside provenance.json."""
    table = summarise(runs)
    text = as_text(table, runs, budget, remarks)
    write_text(folder / "table.txt", text)
    write_text(folder / "table.csv", table.to_csv(index=False))
    draw(table, runs, folder / "table.png")
    write_json(folder / "provenance.json", runs.iloc[0]["provenance"])
    print(f"\n{text}\nTable and picture: {folder}")
