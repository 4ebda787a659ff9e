"""The tables of a sweep: every record, a summary of the cells, paired differences, and what a reader must know."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd

from experiments.files import read_json, write_text
from experiments.records import CHOICE, baseline, statistics
from experiments.sweeps.sweep import Sweep
from uniproj.budget import TOLERANCE

_NESTED = ("config", "cost", "provenance", "best", "scores", "groups", "incomplete_data", "hyperparameters", "classes")


def write(folder: Path, sweep: Sweep, records: pd.DataFrame) -> None:
    """Print the tables and save them in `folder`: records.csv, summary.csv, paired.csv and tables.txt."""
    summary, differences = statistics.summary(records), statistics.paired(records, statistics.reference(records))
    summary["beats_majority"] = summary["cell"].map(baseline.beats(records, "cell"))
    text = as_text(sweep, folder, records, summary, differences)
    write_text(folder / "records.csv", flat(records).to_csv(index=False))
    write_text(folder / "summary.csv", summary.to_csv(index=False))
    write_text(folder / "paired.csv", differences.to_csv(index=False))
    write_text(folder / "tables.txt", text)
    print(f"\n{text}\nTables: {folder}")


def flat(records: pd.DataFrame) -> pd.DataFrame:
    """Records with nested values as JSON, for CSV."""
    return records.assign(
        **{key: records[key].map(lambda v: json.dumps(v, sort_keys=True)) for key in _NESTED if key in records}
    )


def as_text(sweep: Sweep, folder: Path, records: pd.DataFrame, summary: pd.DataFrame, differences: pd.DataFrame) -> str:
    """The tables for a terminal, with what their numbers mean."""
    parts = [f"Sweep {sweep.name}: {len(summary)} cells, seeds {list(sweep.seeds)}", _cells(sweep, summary)]
    if len(differences):
        parts += ["Paired differences to the reference, in points (95 % intervals)", _differences(summary, differences)]
    return "\n\n".join([*parts, "\n".join(_notes(sweep, folder, records, summary))]) + "\n"


def _asked(summary: pd.DataFrame) -> pd.DataFrame:
    """What makes each cell another one, by the cell's digest."""
    asked = summary.set_index("cell").filter(regex=r"^cell\.")
    return asked.rename(columns=lambda key: key.removeprefix("cell."))


def _cells(sweep: Sweep, summary: pd.DataFrame) -> str:
    shown = _asked(summary).reset_index(drop=True)
    shown = shown.assign(
        metric=summary["metric"],
        last=[statistics.percent(r.score, r.score_low, r.score_high) for r in summary.itertuples()],
        best=[statistics.percent(r.best_score) for r in summary.itertuples()],
        seeds=summary["n"].astype(str) + f"/{len(sweep.seeds)}",
        trained=summary["trained"].map(statistics.count),
        stored=summary["adapter_bytes"].map(statistics.count),
        lr=summary["lr"].map("{:g}".format),
        status=summary["status"],
    )
    shown["last"] += baseline.marks(summary["beats_majority"])
    shown.insert(shown.columns.get_loc("best"), "majority", [statistics.percent(m) for m in summary["majority"]])
    if sweep.published:
        shown["published"] = summary["task"].map(lambda task: sweep.published.get(task, "-"))
    return shown.to_string(index=False, na_rep="-")


def _differences(summary: pd.DataFrame, differences: pd.DataFrame) -> str:
    shown = _asked(summary).loc[differences["cell"]].reset_index(drop=True)
    shown = shown.assign(**{key: differences[key] for key in ("trained", "reference", "pairs")})
    shown["difference"] = differences["difference"].map(lambda v: f"{100 * v:+.1f}")
    for name, label in (("t", "t over seeds"), ("seeds", "bootstrap over seeds"), ("rows", "bootstrap over rows")):
        low, high = differences[f"{name}_low"], differences[f"{name}_high"]
        shown[label] = [
            "-" if math.isnan(a) else f"[{100 * a:+.1f}, {100 * b:+.1f}]" for a, b in zip(low, high, strict=True)
        ]
    return shown.to_string(index=False, na_rep="-")


def beyond_budget(table: pd.DataFrame) -> list[str]:
    """What a reader must know of rows that do not come near to the budget."""
    beyond = table[table["budget_error"].astype(float).abs() > TOLERANCE]
    return [
        f"{row.projection} cannot come nearer to the budget than {row.budget_error:+.1%} ({row.trained:,} trained): it "
        f"is beyond {TOLERANCE:.0%}, so its score is not at an equal budget."
        for row in beyond.itertuples()
    ]


def _notes(sweep: Sweep, folder: Path, records: pd.DataFrame, summary: pd.DataFrame) -> list[str]:
    notes = [
        "last: after the last step, mean over the seeds that trained with Student's 95 % interval; best: mean of the "
        "checkpoints with the best validation score.",
        baseline.RULE,
    ]
    incomplete = summary[summary["status"] != "complete"]
    if len(incomplete):
        notes.append(f"{len(incomplete)} of {len(summary)} cells are incomplete or did not train: do not rank them.")
    for row in summary[summary["stuck"].notna()].itertuples():
        notes.append(f"did not train, so in no mean: {row.projection} on {row.task}, {row.stuck}")
    for reason in sorted(set(records["failed"].dropna())):
        notes.append(f"failed: {reason}")
    notes += beyond_budget(summary)
    parts = {json.dumps(v, sort_keys=True) for v in records.get("incomplete_data", []) if isinstance(v, dict) and v}
    for part in sorted(parts):
        notes.append(f"The data at hand differ from those published, so the scores are not comparable: {part}")
    if (folder / CHOICE).exists():
        locked = read_json(folder / CHOICE)
        choices = locked["choices"]
        notes.append(f"{locked['trials_per_cell']} trials per cell, locked {locked['locked']} in {folder / CHOICE}.")
        if further := [len(choice["beyond"]) for choice in choices if choice.get("beyond")]:
            notes.append(
                f"{len(further)} of {len(choices)} cells were tuned further, at {min(further)} to {max(further)} rates "
                "beyond the grid, since their best lay at its edge."
            )
        tried = [point for choice in choices for point in choice.get("tried", ())]
        if pruned := [point for point in tried if point["pruned"]]:
            notes.append(f"{len(pruned)} of {len(tried)} points of the tuning were pruned, since a run did not train.")
        if edge := [choice["cell"] for choice in choices if choice["at_edge"]]:
            notes.append(f"{len(edge)} of {len(choices)} choices lie at the edge of what was tried.")
    return notes
