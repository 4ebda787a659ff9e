"""docs/capabilities.md: its rows, as text and back."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version

from experiments.provenance import device_name

YES, REFUSES, NO = "yes", "refuses", "no"
SECTIONS = (
    "PEFT: adapters",
    "PEFT: configuration",
    "PEFT: base models and layers",
    "Architectures",
    "Quantised bases",
    "Transformers",
    "TRL",
    "Accelerate and torch.distributed",
    "Other formats",
    "Engines",
)
PACKAGES = ("peft", "transformers", "trl", "accelerate", "bitsandbytes", "torchao", "hqq", "aqlm", "torch")
HEAD = """# What works with PEFT, Transformers, TRL and Accelerate

Written by `python -m analysis.capabilities`, which does each of these things on a tiny model and checks the outcome
against a fact of its own; do not edit. "yes": it works, and the check holds. "refuses": uniproj raises the sentence on
the right, or the library named before the sentence does. "no": it does something else than it should, or fails without
a sentence. Figures are those of the machine that wrote this page ({processor}; no GPU).

{versions}. {counts}.

Architectures are small models with random weights. "yes" there: the loss falls in three steps, another process loads
the adapter with the same output to the last bit, D is the count of PEFT's LORA, and the merged model and PEFT's LORA
with the exported adapter give that output but for rounding.

Engines of other projects were run by `python -m pytest tests/engines -m slow --engines results/engines`, each in an
environment of its own; their rows are what results/engines has.

Not probed, as they were not at hand: DeepSpeed, GPUs, and bases quantised by EETQ or INC; GPTQ and AWQ, which need a
GPU, are by the contract of PEFT's layer around theirs.
"""


@dataclass(frozen=True)
class Row:
    """answer: yes, refuses or no; remark: what was measured, or the sentence of the refusal or fault."""

    section: str
    name: str
    answer: str
    remark: str

    def without_figures(self) -> tuple[str, str, str]:
        """What must be the same on every machine: the answer, and a sentence but for its numbers."""
        sentence = "" if self.answer == YES else re.sub(r"\d+(\.\d+)?(e-?\d+)?", "#", self.remark)
        return self.name, self.answer, sentence.strip()


def markdown(rows: Iterable[Row]) -> str:
    """The page, one table per section; rows keep their order."""
    rows = sorted(rows, key=lambda row: SECTIONS.index(row.section))
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    answers = [row.answer for row in rows]
    counts = f"{len(rows)} capabilities: " + ", ".join(f"{answers.count(a)} {a}" for a in (YES, REFUSES, NO))
    lines = [HEAD.format(processor=device_name("cpu"), versions=versions, counts=counts)]
    for section in dict.fromkeys(row.section for row in rows):
        lines += [f"## {section}\n", "| capability | | |", "|---|---|---|"]
        lines += [
            f"| {_cell(row.name)} | {row.answer} | {_cell(row.remark)} |" for row in rows if row.section == section
        ]
        lines.append("")
    return "\n".join(lines)


def read(page: str) -> dict[str, Row]:
    """The rows of a page, by the name of the capability."""
    section, found = "", {}
    for line in page.splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| ") and section and not line.startswith("| capability"):
            name, answer, remark = (cell.replace(r"\|", "|") for cell in re.split(r" ?(?<!\\)\| ?", line)[1:4])
            found[name] = Row(section, name, answer, remark)
    return found


def _cell(text: str) -> str:
    return text.replace("|", r"\|").strip()
