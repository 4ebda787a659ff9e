"""A process that ends with the one that started it, however that one ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

# of sys/prctl.h
_PR_SET_PDEATHSIG = 1
# before any fork, after which a lock of the loader may be held for ever
_libc = ctypes.CDLL(None)


def end_with(parent: int) -> None:
    """Kill this process when `parent`, which started it, ends, and at once where it has ended. Linux only.

    The kernel keeps to it when this process executes another program. What is left behind is what `kill -9` leaves: a
    run goes on from its last whole checkpoint.
    """
    if sys.platform != "linux":
        return
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def ending_with_this(command: Sequence[str]) -> list[str]:
    """What starts a command of any program as a process that ends with this one, which starts it.

    By a Python of its own: what `subprocess` calls before it executes a program runs in a fork of a process with
    threads, and may wait for ever for what one of them held.
    """
    return [sys.executable, "-IS", __file__, str(os.getpid()), *command]


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
