"""The page of a GPU: how far each part got, its tests and mixed batches; kernels and models have overhead's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.bank.report import table
from analysis.markdown import markdown
from analysis.overhead import report, runner, summary
from analysis.overhead.report import Cell, count, interval, number, text
from experiments.files import write_json, write_text

_Many = Sequence[Mapping[str, Any]]
_ABOUT = (
    "Without the time in which the GPU waits for the processor, beside a copy of D floats (8 D bytes). At D = 1e7 a "
    "part of theta_D stays in the cache, of the copy as of the others."
)
_ALONE: Mapping[str, Cell] = {
    "case": text("case"),
    "D": count("D"),
    "method": text("method"),
    "forward, µs": number("gpu_forward_seconds", 1e6),
    "adjoint, µs": number("gpu_adjoint_seconds", 1e6),
    "forward / copy": interval("gpu_forward_per_copy", "{:.3g}".format),
    "adjoint / copy": interval("gpu_adjoint_per_copy", "{:.3g}".format),
}


def write(out: Path, asked: Mapping[str, _Many]) -> tuple[str, bool]:
    """Write all tables of what is recorded of the parts; returns the page, and whether all of it is done."""
    records = {part: runner.load(out, jobs) for part, jobs in asked.items()}
    everything = [record for found in records.values() for record in found]
    if not everything:
        return "Nothing was measured.", False
    if timed := [*records["kernel"], *records["model"]]:
        report.write(out, timed)
    progress = [_progress(part, jobs, records[part]) for part, jobs in asked.items()]
    tests, mixed = (summary.rows(everything, part) for part in ("tests", "mixed"))
    where_from = summary.origin(everything)
    write_json(out / "gpu.json", {"provenance": where_from, "parts": progress, "tests": tests, "mixed": mixed})
    sections = [
        "# What a GPU says",
        report.hardware_line(where_from),
        table(progress),
        "Kernels, training steps and decoding: [overhead.md](overhead.md).",
        *_alone(summary.rows(everything, "kernel")),
        *_tests(tests),
        *_mixed(mixed),
    ]
    page = "\n\n".join(sections) + "\n"
    write_text(out / "gpu.md", page)
    return page, not any(row["failed"] or row["left out"] for row in progress)


def _progress(part: str, jobs: _Many, records: _Many) -> dict[str, Any]:
    found = {runner.describe(record["config"]) for record in records}
    return {
        "part": part,
        "asked": len(jobs),
        "done": sum(record["status"] == runner.DONE for record in records),
        "failed": "; ".join(_describe(row) for row in summary.failures(records)),
        "left out": "; ".join(name for job in jobs if (name := runner.describe(job)) not in found),
    }


def _describe(row: Mapping[str, Any]) -> str:
    """A row of any part whose note says how it failed."""
    keys = ("test", "paths", "case", "family", "base", "method", "targets", "users")
    return f"{' '.join(str(row[key]) for key in keys if key in row)} {row['note']}"


def _alone(rows: _Many) -> list[str]:
    """The kernels, timed by the GPU itself where there is one."""
    timed = [dict(row) for row in rows if "gpu_forward_seconds" in row]
    return ["## Kernels, the GPU alone", _ABOUT, report.table(_ALONE, timed).rstrip()] if timed else []


def _tests(rows: _Many) -> list[str]:
    """How many of each file passed, and what was skipped for which reason."""
    if not rows:
        return []
    outcomes: dict[str, dict[str, int]] = {}
    for row in rows:
        counts = outcomes.setdefault(row.get("test", row.get("paths", "")).split("::")[0], dict.fromkeys(_OUTCOMES, 0))
        counts[row["note"].partition(":")[0] or "passed"] += 1
    skipped = sorted({f"{row['test'].split('::')[-1].split('[')[0]}: {row['note']}" for row in rows if _skipped(row)})
    counted = markdown(["tests", *_OUTCOMES], *([file, *map(str, c.values())] for file, c in outcomes.items()))
    return ["## Tests", counted, *(["\n".join(f"- {line}" for line in skipped)] if skipped else [])]


_OUTCOMES = ("passed", "failed", "skipped")


def _skipped(row: Mapping[str, Any]) -> bool:
    return bool(row["note"].startswith("skipped"))


def _mixed(rows: _Many) -> list[str]:
    """The two tables of `analysis.bank`, of all sizes."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "table" in row:
            tables.setdefault(row["table"], []).append({key: row[key] for key in row if key != "table"})
    return ["## Mixed batches", *(f"{kind}:\n\n{table(of)}" for kind, of in tables.items())] if tables else []
