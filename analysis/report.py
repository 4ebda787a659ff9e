"""`python -m analysis.report`: the command of `paper_figures.report`."""

import sys

from paper_figures.report.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
