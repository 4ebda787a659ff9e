"""Records to files: CSV per part, JSON with everything, Markdown for the docs, and the picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.markdown import markdown
from analysis.overhead import summary
from analysis.overhead.goals import goals
from analysis.overhead.growth import PER_COLUMN
from analysis.overhead.shapes import GROWTH_RANK
from analysis.overhead.summary import PREDICTED_RANK, Row, beside_lora, exponents, predicted_D, rows
from experiments.files import write_bytes, write_json, write_text

PARTS = ("kernel", "model", "growth")
NOT_MEASURED = "-"
Cell = Callable[[Row], str]
Draw = Callable[[Sequence[Row], Sequence[Row]], bytes | None]


def _where_measured(key: str, show: Callable[[Row], str]) -> Cell:
    return lambda row: show(row) if row.get(key) is not None else NOT_MEASURED


def number(key: str, scale: float = 1.0) -> Cell:
    """Three significant digits of a value times `scale`."""
    return _where_measured(key, lambda row: _short(scale * row[key]))


def count(key: str) -> Cell:
    """A whole number with separators."""
    return _where_measured(key, lambda row: f"{row[key]:,.0f}")


def text(key: str) -> Cell:
    """A word as it is."""
    return lambda row: str(row.get(key, NOT_MEASURED))


def interval(key: str, digits: Callable[[float], str]) -> Cell:
    """A median ratio with its interval."""
    low, high = f"{key}_low", f"{key}_high"
    return _where_measured(key, lambda row: f"{digits(row[key])} [{digits(row[low])}, {digits(row[high])}]")


def _per_coordinate(key: str) -> Cell:
    """Bytes for each coordinate of theta_D."""
    return _where_measured("D", lambda row: _short(row[key] / row["D"]))


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _hundredths(value: float) -> str:
    return f"{value:.2f}"


def exponent(of: str) -> Cell:
    """A fitted exponent with its standard error."""
    key, error = f"{of}_exponent", f"{of}_exponent_error"
    return _where_measured(key, lambda row: f"{row[key]:.2f} ± {row[error]:.2f}")


_ABOUT_KERNEL = (
    "Forward and adjoint over all modules in float32. Ratios: median of paired ratios, 95 % interval; the methods of "
    "one family take turns with the two floors. `copy`: D floats into memory that is there, which reads 4 D bytes and "
    "writes 4 D, as a forward and an adjoint together must. `clone`: the same into fresh memory, with its page faults, "
    "which every method that returns a new theta_D asks for. All methods go through autograd, those of PyTorch's "
    "operators that lack the derivative by a Function of ten lines."
)
_ABOUT_MODEL = (
    "Each adapter in turn with PEFT's LoRA of the same rank on the same base. Step: forward, backward, AdamW; "
    "inference: a generated token, or the forward pass of an encoder. Ratios: median of paired ratios, 95 % interval. "
    "Peak: the most memory of a training step beyond the bare base. Attach, save and load are single times."
)
KERNEL: Mapping[str, Cell] = {
    "case": text("case"),
    "D": count("D"),
    "d": count("d"),
    "modules": count("modules"),
    "method": text("method"),
    "backend": text("backend"),
    "forward, ms": number("forward_seconds", 1e3),
    "adjoint, ms": number("adjoint_seconds", 1e3),
    "both, ms": number("both_seconds", 1e3),
    "forward / copy": interval("forward_per_copy", _short),
    "adjoint / copy": interval("adjoint_per_copy", _short),
    "both / copy": interval("both_per_copy", _short),
    "both / clone": interval("both_per_clone", _short),
    "both / uniproj": interval("both_per_ours", _short),
    "state, B per coordinate": number("bytes_per_coordinate"),
    "trained": count("trained"),
    "build, s": number("build_seconds"),
    "turns": count("rounds"),
    "note": text("note"),
}
MODEL: Mapping[str, Cell] = {
    "base": text("base"),
    "method": text("method"),
    "D": count("D"),
    "trained": count("trained"),
    "attach, s": number("attach_seconds"),
    "step / LoRA": interval("step_ratio", _hundredths),
    "step / LoRA, checkpointing": interval("checkpointing_step_ratio", _hundredths),
    "inference / LoRA": interval("inference_ratio", _hundredths),
    "state, B per coordinate": _per_coordinate("state_bytes"),
    "peak, MB": number("peak_bytes", 1e-6),
    "peak - LoRA, B per coordinate": number("peak_bytes_per_coordinate_beyond_lora"),
    "the same, checkpointing": number("checkpointing_peak_bytes_per_coordinate_beyond_lora"),
    "save, s": number("save_seconds"),
    "load, s": number("load_seconds"),
    "file, B": count("file_bytes"),
    "pairs": count("step_pairs"),
    "note": text("note"),
}
GOALS: Mapping[str, Cell] = {
    "goal": text("what"),
    "bound": text("goal"),
    "measured": lambda row: interval("value", _short)(row) if "value_low" in row else number("value")(row),
    "reached": text("reached"),
}
GROWTH: Mapping[str, Cell] = {
    "method": text("method"),
    "along": text("axis"),
    "from": count("smallest"),
    "to": count("largest"),
    "sizes": count("sizes"),
    "exponent of time": exponent("time"),
    "exponent of peak": exponent("peak"),
    "both at the largest, s": number("both_seconds"),
    "build, s": number("build_seconds"),
    "state, B per coordinate": _per_coordinate("resident_bytes"),
    "peak, B per coordinate": _per_coordinate("peak_bytes"),
    "405B: both, s (extrapolated)": number("predicted_seconds"),
    "405B: state, GB (extrapolated)": number("predicted_resident_bytes", 1e-9),
    "note": text("note"),
}


def _about_growth() -> str:
    """What was varied, and the layout of the extrapolation."""
    return (
        "Exponents: time (forward + adjoint) and peak memory as powers of D or d, fitted to the upper half of the "
        f"sizes, with the standard error of the fit. Along D at r = {GROWTH_RANK}, D / d = {PER_COLUMN} where d is "
        f"free. 405B, extrapolated: all linear layers at r = {PREDICTED_RANK}, D = {predicted_D():,}."
    )


def _as_markdown(parts: Mapping[str, Sequence[Row]], origin: Mapping[str, Any]) -> str:
    """The hardware line and one section for each part that has rows, with what its columns mean."""
    sections = [f"{hardware_line(origin)}\n"]
    if parts["goals"]:
        sections.append("## Goals\n\n" + table(GOALS, parts["goals"]))
    if parts["kernel"]:
        sections.append(f"## Kernel\n\n{_ABOUT_KERNEL}\n\n" + table(KERNEL, parts["kernel"]))
    if parts["model"]:
        sections.append(f"## Model\n\n{_ABOUT_MODEL}\n\n" + table(MODEL, parts["model"]))
    if parts["exponents"]:
        sections.append(f"## Growth\n\n{_about_growth()}\n\n" + table(GROWTH, parts["exponents"]))
    return "\n".join(sections)


def hardware_line(origin: Mapping[str, Any]) -> str:
    """Device, threads, versions, commits and dates in one sentence."""
    hardware = origin["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    return (
        f"Measured on {hardware['device']}, {hardware['cores']} cores, threads: {hardware['threads']}; {versions}; "
        f"commit {', '.join(origin['commits'])}; {origin['first']} to {origin['last']}."
    )


def table(columns: Mapping[str, Cell], found: Sequence[Row]) -> str:
    # a row without a note has none
    lines = ([cell({"note": "", **row}) for cell in columns.values()] for row in found)
    return markdown(list(columns), *lines) + "\n"


def _csv(found: Sequence[Row]) -> str:
    lines = io.StringIO()
    columns = dict.fromkeys(key for row in found for key in row)
    table = csv.DictWriter(lines, list(columns), lineterminator="\n")
    table.writeheader()
    table.writerows(found)
    return lines.getvalue()


def write(out: Path, records: Sequence[Mapping[str, Any]], draw: Draw | None = None) -> tuple[dict[str, Any], str]:
    """Write every file into `out`, and what `draw` makes of kernels and models; returns the JSON and the tables.

    Needs at least one record.
    """
    where_from = summary.origin(records)
    parts = {part: rows(records, part) for part in PARTS}
    # the points of the growth part and their fits are two tables
    parts |= {"model": beside_lora(parts["model"]), "exponents": exponents(parts["growth"])}
    on_cpu = records[0]["config"]["device"] == "cpu"  # all records of one command share it
    parts["goals"] = goals(parts["kernel"], parts["model"]) if on_cpu else []
    everything = {
        "provenance": where_from,
        "records": list(records),
        "model": parts["model"],
        "growth": parts["exponents"],
        "goals": parts["goals"],
    }
    text = _as_markdown(parts, where_from)
    write_json(out / "overhead.json", everything)
    write_text(out / "overhead.md", text)
    for part, found in parts.items():
        if found:
            write_text(out / f"overhead-{part}.csv", _csv(found))
    picture = draw(parts["kernel"], parts["model"]) if draw else None
    if picture is not None:
        write_bytes(out / "overhead.png", picture)
    return everything, text
