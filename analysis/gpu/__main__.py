"""All that is asked of a GPU: `python -m analysis.gpu` tests the kernels there and times them, models and banks."""

import sys

from analysis.gpu.packages import missing


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 all of it is done, 1 something failed or did not fit, 2 bad input, 130 interrupted."""
    if lacking := missing():
        print(f"gpu: these packages must be installed: {'; '.join(lacking)}. Install them with pip.", file=sys.stderr)
        return 2
    from analysis.gpu import command  # which imports them

    return command.main(argv)


if __name__ == "__main__":
    sys.exit(main())
