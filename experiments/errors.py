"""The one error that a researcher's input can cause in the experiments, and what a command makes of it."""

import sys
from collections.abc import Callable
from pathlib import Path

from uniproj.errors import OneLineError

# exit status of what Ctrl-C stopped
INTERRUPTED = 130


class ExperimentError(OneLineError):
    """Unknown names, unreadable data, damaged results: the message says what to do next."""


def status(action: Callable[[], int], runs: Path | None = None, interrupted: str | None = None) -> int:
    """The exit status of a command: that of `action`, or 2 and one line on standard error for bad input.

    runs: for a command that trains, the folder of its results: status 130 where it is interrupted. interrupted: the
    same for one that measures: how the sentence "Interrupted" goes on, on standard error.
    """
    try:
        return action()
    except OneLineError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if interrupted is not None:
            print(f"\nInterrupted{interrupted}", file=sys.stderr)
            return INTERRUPTED
        if runs is None:
            raise
        print(f"\nInterrupted; finished runs and checkpoints are in {runs}. The same command resumes.")
        return INTERRUPTED
