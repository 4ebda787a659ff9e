"""`python -m analysis.isometry`: is P an isometry, at any size, on real directions, and while it is learned?"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from analysis import command
from analysis.isometry.distortion import measured
from analysis.isometry.verdicts import verdicts
from analysis.spaces import defaults, variants
from analysis.subject import Subject, add_options, add_training, from_options
from paper_figures import style
from paper_figures.figures.isometry import draw


def measure(args: argparse.Namespace) -> command.Tables:
    """Verdicts on every choice of hyperparameters; trainings with the defaults."""
    names = command.chosen(args)
    chosen = variants(names)
    tables = {"verdicts": verdicts(chosen, args.layout, args.rank, args.d, args.seed, args.plugins)}
    if args.steps > 0:
        subject = Subject(from_options(args))
        tables["distortion"], tables["training"] = measured(subject, defaults(names), args.d, args.steps, args.lr)
    return tables


options = command.parser("isometry", __doc__)
options.add_argument("--layout", default="eight-64", help="of the verdicts: a name in analysis.spaces or a model")
options.add_argument("--d", type=int, default=1024, help="length of theta_d where a method leaves it free")
add_training(options, 30, " for real pairs; 0 for the verdicts alone", "theta_d", least=0)
add_options(options)
main = partial(command.run, "isometry", options, measure, style.picture(draw))

if __name__ == "__main__":
    sys.exit(main())
