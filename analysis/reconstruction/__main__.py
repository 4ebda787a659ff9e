"""`python -m analysis.reconstruction`: how much of a trained LoRA can each projection represent?"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from analysis import command
from analysis.reconstruction.measure import reconstruct
from analysis.spaces import defaults
from analysis.subject import Subject, add_options, add_training, from_options
from analysis.training import train_lora
from paper_figures import style
from paper_figures.figures.reconstruction import draw


def measure(args: argparse.Namespace) -> command.Tables:
    """Train or load a LoRA, and reconstruct it."""
    names = command.chosen(args)
    subject = Subject(from_options(args), args.adapter)
    if args.adapter is None:
        theta_D, head = train_lora(subject, args.steps, args.lr)
    else:
        theta_D, head = subject.theta_D, subject.head
    return {"energy": reconstruct(subject, theta_D, head, defaults(names), args.d)}


options = command.parser("reconstruction", __doc__)
options.add_argument("--adapter", type=Path, help="a folder with a LoRA adapter (default: train one)")
add_training(options, 100, ", without --adapter", "theta_D")
options.add_argument("--d", type=int, nargs="+", default=[64, 512, 4096], help="lengths of theta_d where free")
add_options(options)
main = partial(command.run, "reconstruction", options, measure, style.picture(draw))

if __name__ == "__main__":
    sys.exit(main())
