"""Outcomes to Markdown and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib.metadata import version

from analysis.capabilities.probe import Outcome

PACKAGES = ("peft", "transformers", "trl", "accelerate", "bitsandbytes", "torch")
HEAD = """# What works with PEFT, Transformers, TRL and Accelerate

Written by `python -m analysis.capabilities`, which does each of these things on a tiny model and checks the outcome
against a fact of its own; do not edit. "yes": it works, and the check holds. "refuses": uniproj raises the sentence on
the right, or the library named before the sentence does. "no": it does something else than it should, or fails without
a sentence. Figures are those of the machine that wrote this page ({processor}; no GPU).

{versions}. {counts}.

Not probed, as they were not at hand: vLLM itself (its format rules are), DeepSpeed, GPUs, and bases quantised by GPTQ,
AWQ, AQLM, HQQ, EETQ or torchao.
"""


def markdown(outcomes: Sequence[Outcome], processor: str) -> str:
    """The page, one table per section, in the order in which the probes are registered."""
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    answers = [outcome.answer for outcome in outcomes]
    counts = f"{len(answers)} capabilities: " + ", ".join(f"{answers.count(a)} {a}" for a in ("yes", "refuses", "no"))
    lines = [HEAD.format(processor=processor, versions=versions, counts=counts)]
    for section in dict.fromkeys(outcome.section for outcome in outcomes):
        lines += [f"## {section}\n", "| capability | | |", "|---|---|---|"]
        for outcome in (outcome for outcome in outcomes if outcome.section == section):
            lines.append(f"| {_cell(outcome.name)} | {outcome.answer} | {_cell(outcome.remark)} |")
        lines.append("")
    return "\n".join(lines)


def read(page: str) -> dict[str, Outcome]:
    """The outcomes of a page, by name of the capability."""
    section, found = "", {}
    for line in page.splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| ") and section and not line.startswith("| capability"):
            name, answer, remark = (cell.replace(r"\|", "|") for cell in re.split(r" ?(?<!\\)\| ?", line)[1:4])
            found[name] = Outcome(section, name, answer, remark)
    return found


def without_figures(outcomes: Iterable[Outcome]) -> list[tuple[str, str, str]]:
    """What must be the same on every machine: answers, and the sentences of refusals and faults but for numbers."""
    return [
        (o.name, o.answer, "" if o.answer == "yes" else re.sub(r"\d+(\.\d+)?(e-?\d+)?", "#", _cell(o.remark)))
        for o in outcomes
    ]


def _cell(text: str) -> str:
    return text.replace("|", r"\|").strip()
