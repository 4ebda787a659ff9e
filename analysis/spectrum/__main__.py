"""`python -m analysis.spectrum`: what are the singular values of P, and of the A, B and delta W that it produces?"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from analysis import command
from analysis.spaces import layout, variants
from analysis.spectrum.measure import spectrum
from paper_figures import style
from paper_figures.figures.spectrum import draw


def measure(args: argparse.Namespace) -> command.Tables:
    """The tables of one space."""
    space = layout(args.layout, args.rank)
    facts, values = spectrum(variants(command.chosen(args)), space, args.d, args.seed)
    return {"spectrum": facts, "values": values}


options = command.parser("spectrum", __doc__)
command.add_space(options)
main = partial(command.run, "spectrum", options, measure, style.picture(draw))

if __name__ == "__main__":
    sys.exit(main())
