"""Forked processes that do some work: to their end, or until they are killed."""

import os
import signal
from collections.abc import Callable


def in_child(work: Callable[[], object]) -> None:
    """Do something in a forked process; what goes wrong there goes wrong here."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def dies_in_child(work: Callable[[], object]) -> None:
    """Do something in a forked process, which must kill itself before it is done."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(3)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def end(child: int) -> None:
    """Kill a process of the test and wait for its end."""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
