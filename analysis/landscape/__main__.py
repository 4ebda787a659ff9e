"""`python -m analysis.landscape`: the loss along directions of the subspace, and what it keeps of LoRA's gradient"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from analysis import command
from analysis.landscape.measure import landscape
from analysis.spaces import defaults
from analysis.subject import Subject, add_options, add_training, from_options
from paper_figures import style
from paper_figures.figures.landscape import draw


def measure(args: argparse.Namespace) -> command.Tables:
    """The tables of one model and task."""
    chosen = command.chosen(args)
    norms, losses = landscape(Subject(from_options(args)), defaults(chosen), args.d, args.steps, args.lr)
    return {"gradients": norms, "losses": losses}


options = command.parser("landscape", __doc__)
options.add_argument("--d", type=int, default=1024, help="length of theta_d where a method leaves it free")
add_training(options, 30, "", "theta_d")
add_options(options)
main = partial(command.run, "landscape", options, measure, style.picture(draw))

if __name__ == "__main__":
    sys.exit(main())
