"""What works with PEFT and its neighbours: `python -m analysis.capabilities` does it all and writes the table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging

from analysis.capabilities import accelerating, adapters, bases, formats, quantised, settings, trainer, trl_trainers
from analysis.capabilities.probe import PROBES, Outcome, Probe, run
from analysis.capabilities.table import markdown
from experiments.files import write_text
from experiments.runs.provenance import device_name
from uniproj import console

PAGE = Path("docs/capabilities.md")
SECTIONS = (
    adapters.PEFT,
    settings.SETTINGS,
    bases.BASES,
    quantised.QUANTISED,
    trainer.TRANSFORMERS,
    trl_trainers.TRL,
    accelerating.ACCELERATE,
    formats.FORMATS,
)


def chosen(words: Sequence[str]) -> list[Probe]:
    """The probes whose section or name holds one of the words; all of them without words. In the page's order."""
    ordered = sorted(PROBES, key=lambda probe: SECTIONS.index(probe.section))
    return [probe for probe in ordered if not words or any(w in f"{probe.section} {probe.name}" for w in words)]


@console.command
def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 1 where a capability is answered with "no", 2 where no probe is chosen."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.capabilities", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("words", nargs="*", help="probe only what holds one of these words, and print it")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page that is written when everything is probed")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    probes = chosen(args.words)
    if not probes:
        print(f"capabilities: a probe must hold one of {args.words}, got none. Leave the words out.", file=sys.stderr)
        return 2
    logging.set_verbosity_error()
    torch.set_num_threads(1)  # the models are tiny: threads would wait for each other
    outcomes = [run(probe) for probe in tqdm(probes, unit="probe", disable=not sys.stderr.isatty())]
    if not args.words:
        write_text(args.out, markdown(outcomes, device_name("cpu")))
    print(json.dumps([asdict(o) for o in outcomes], indent=2) if args.json else _lines(outcomes))
    return int(any(outcome.answer == "no" for outcome in outcomes))


def _lines(outcomes: Sequence[Outcome]) -> str:
    return "\n".join(f"{o.answer:8s}{o.name}{': ' if o.remark else ''}{o.remark}" for o in outcomes)


if __name__ == "__main__":
    sys.exit(main())
