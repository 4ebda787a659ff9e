"""Records of the parts to files: JSON each, and one table of all in Markdown."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.markdown import markdown
from experiments.files import read_json, write_json, write_text
from experiments.provenance import asked

TARGETS = (
    "10,000 adapters of d = 23,040 in at most 1.05 times their bytes, opened in under 1 s; a switch at N = 10,000 in "
    "at most 1.1 times that at N = 10, and at most 0.5 times PEFT's load and set_adapter of a LoRA; a token of a mixed "
    "batch of 16 users at least 2 times faster than with `adapter_names=`; in the soak no adapter lost or torn, and no "
    "read blocked for 1 s."
)


def save(out: Path, part: str, args: argparse.Namespace, found: Mapping[str, Any]) -> None:
    """The record of one part, with the load of the machine at its end: others' work shows in times on the clock."""
    load = dict(zip(("1 min", "5 min", "15 min"), os.getloadavg(), strict=True))
    write_json(out / f"{part}.json", {**asked(args, "out", "scratch", "parts"), "load_average": load, **found})


def write(out: Path) -> str:
    """The table of the parts that were measured, written and returned."""
    texts = ["# Banks of adapters, measured", f"Asked for: {TARGETS}"]
    for part in ("bank", "mixed", "soak"):
        if (out / f"{part}.json").exists():
            texts += _part(part, read_json(out / f"{part}.json"))
    text = "\n\n".join(texts) + "\n"
    write_text(out / "bank.md", text)
    return text


def _part(part: str, record: Mapping[str, Any]) -> list[str]:
    where, hardware = record["provenance"], record["provenance"]["hardware"]
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "peft", "transformers"))
    origin = (
        f"{hardware['device']}, {hardware['cores']} cores, {hardware['threads']} threads, load average "
        f"{record['load_average']['5 min']:.1f}; {versions}; commit {where['commit']}; {where['finished']}."
    )
    tables = [f"{key}:\n\n{table(value)}" for key, value in record.items() if isinstance(value, list)]
    notes = [f"{key}: {value}" for key, value in record.items() if isinstance(value, str)]
    return [f"## {part}", origin, *tables, *notes]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as they are, with a column for each of their keys."""
    columns = dict.fromkeys(key for row in rows for key in row)
    return markdown(list(columns), *([_cell(row.get(key, "")) for key in columns] for row in rows))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value == int(value) and abs(value) > 99 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
