"""Forked processes that do some work: to their end, until they are killed, or until their time is up."""

import os
import pickle
import signal
from collections.abc import Callable
from typing import Any

SECONDS = 60


def fork(work: Callable[[], object], seconds: int = SECONDS) -> int:
    """The id of a forked process that does some work, and that is ended where it takes longer.

    What goes wrong there is told on standard error and ends it with 1: it never goes on with the tests.
    """
    if child := os.fork():
        return child
    status = 1
    try:
        limit(seconds)
        work()
        status = 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(status)


def limit(seconds: int = SECONDS) -> None:
    """Let the system end this process after these seconds, even if it waits for a lock that nobody gives back.

    That of a thread which its parent had at the fork, for one.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)


def in_child(work: Callable[[], object]) -> None:
    """Do something in a forked process; what goes wrong there goes wrong here."""
    assert exitcode(fork(work)) == 0


def dies_in_child(work: Callable[[], object]) -> None:
    """Do something in a forked process, which must kill itself before it is done."""
    assert exitcode(fork(work)) == -signal.SIGKILL


def found_in_child(work: Callable[[], Any]) -> Any:
    """What `work` returns in a forked process."""
    reader, writer = os.pipe()

    def tell() -> None:
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(work(), pipe)

    child = fork(tell, seconds=120)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    assert exitcode(child) == 0
    return pickle.loads(told)


def exitcode(child: int) -> int:
    """How a process ended: its exit status, or a signal's number, negated."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def end(child: int) -> None:
    """Kill a process of the test and wait for its end."""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
