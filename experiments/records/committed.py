"""A sweep's records in a few small files to commit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.errors import ExperimentError
from experiments.files import short_names, write_json, write_text
from experiments.records import statistics
from experiments.records.reading import CHOICE, losses, result

RECORDS, SUMMARY, PAIRED, CURVES, PROVENANCE = (
    "records.csv",
    "summary.csv",
    "paired.csv",
    "curves.csv",
    "provenance.json",
)
OUT = Path("results/sweeps")
# of a logged loss: its noise is far above the rest
_DIGITS = 5
# in a list as Python writes it
_QUOTED = re.compile(r"(['\"])(.+?)\1")
# an absolute path of two parts or more, and not that of a URL
_PLACE = re.compile(r"(?<![\w./-])(?:/[^\s/\"',;:()<>\[\]]+){2,}")


def export(name: str, runs: Path, out: Path) -> Path:
    """Write records, summary, paired differences, choice, learning curves and provenance; returns their folder.

    Raises ExperimentError where the sweep has no tables yet or a run of its records is gone.
    """
    tables = runs / "sweeps" / name
    if not (tables / RECORDS).exists():
        at_hand = ", ".join(sorted(path.parent.name for path in runs.glob(f"sweeps/*/{RECORDS}"))) or "none"
        raise ExperimentError(
            f"export: {tables / RECORDS} must exist, got none; finished sweeps: {at_hand}. "
            "Run `python -m experiments.sweep` to its end first."
        )
    records = pd.read_csv(tables / RECORDS)
    results = {folder: result(runs / short(folder)) for folder in records.loc[records["failed"].isna(), "folder"]}
    # the tables are made anew: those beside the records may be another version's
    at_hand = records.assign(folder=[str(runs / short(folder)) for folder in records["folder"]])
    texts = {
        RECORDS: _compact(records).to_csv(index=False),
        SUMMARY: statistics.summary(records).to_csv(index=False),
        PAIRED: statistics.paired(at_hand, statistics.reference(records)).to_csv(index=False),
        CURVES: curves(runs, results).to_csv(index=False),
    }
    if (tables / CHOICE).exists():
        if (tables / CHOICE).is_symlink():  # whose target would be committed, whatever it is
            raise ExperimentError(f"export: {tables / CHOICE} must be a file, got a link. Put the file itself there.")
        texts[CHOICE] = (tables / CHOICE).read_text()
    folder = out / name
    for file, text in texts.items():
        write_text(folder / file, without_paths(text, records))
    write_json(folder / PROVENANCE, origin_of(len(records), int(records["failed"].notna().sum()), results))
    return folder


def without_paths(text: str, records: pd.DataFrame) -> str:
    """The text without the paths of the machine that tasks, data, models and plugins of these records lie in, nor
    others, as a failure or an option may name."""
    named = {value for key in ("task", "data", "model") if key in records for value in records[key].dropna()}
    named |= {path for listed in records.get("plugins", ()) for _, path in _QUOTED.findall(str(listed))}
    names = short_names(sorted(named))
    for path in sorted(names, key=len, reverse=True):
        text = text.replace(path, names[path])
    return _PLACE.sub(lambda found: Path(found[0]).name, text)


def short(folder: str) -> str:
    """<task>/<projection>-<hash>: where a run lies below the folder of the runs."""
    return "/".join(Path(folder).parts[-2:])


def _compact(records: pd.DataFrame) -> pd.DataFrame:
    """Records without what provenance.json says once."""
    cost = pd.DataFrame([{} if pd.isna(c) else json.loads(c) for c in records.get("cost", [])], index=records.index)
    kept = records.drop(columns=[key for key in ("provenance", "cost") if key in records])
    return kept.assign(folder=records["folder"].map(short)).join(cost.add_prefix("cost_"))


def curves(runs: Path, folders: Iterable[str]) -> pd.DataFrame:
    """Every logged training loss: run (see `short`), step, loss (NaN where it was not finite)."""
    lines = [
        {"folder": short(folder), "step": line["step"], "loss": line["loss"] and float(f"{line['loss']:.{_DIGITS}g}")}
        for folder in dict.fromkeys(folders)
        for line in losses(runs / short(folder))
    ]
    return pd.DataFrame(lines, columns=["folder", "step", "loss"])


def origin_of(runs: int, failed: int, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Hardware, versions, commits, dates, and the SHA-256 of each adapter by run, of the runs that have a result."""
    origins = [result["provenance"] for result in results.values()]
    finished = sorted(origin["finished"] for origin in origins)
    return {
        "runs": runs,
        "failed": failed,
        "hardware": _distinct(origin["hardware"] for origin in origins),
        "versions": _distinct(origin["versions"] for origin in origins),
        "commits": sorted({str(origin["commit"]) for origin in origins}),
        "first": finished[0] if finished else None,
        "last": finished[-1] if finished else None,
        "adapters": {
            short(f): result["adapter_sha256"] for f, result in sorted(results.items()) if result.get("adapter_sha256")
        },
    }


def _distinct(values: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [json.loads(text) for text in dict.fromkeys(json.dumps(value, sort_keys=True) for value in values)]
