"""`python -m analysis.sharing`: which parts of a model does each coordinate of theta_d touch?"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from analysis import command
from analysis.sharing.measure import sharing
from analysis.spaces import layout, variants
from paper_figures import style
from paper_figures.figures.sharing import draw


def measure(args: argparse.Namespace) -> command.Tables:
    """The tables of one space."""
    space = layout(args.layout, args.rank)
    columns, heat = sharing(variants(command.chosen(args)), space, args.d, args.seed)
    return {"columns": columns, "map": heat}


options = command.parser("sharing", __doc__)
command.add_space(options)
main = partial(command.run, "sharing", options, measure, style.picture(draw))

if __name__ == "__main__":
    sys.exit(main())
