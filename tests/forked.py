"""Forked processes that do some work: to their end, until they are killed, or until their time is up."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from select import select
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
    found = None
    reader, writer = Pipe(duplex=False)
    child = fork(lambda: writer.send(work()), seconds=2 * SECONDS)
    writer.close()
    with reader, suppress(EOFError):
        if reader.poll(2 * SECONDS):
            found = reader.recv()
    assert exitcode(child) == 0
    return found


def heard_from_child(pipe: int) -> bool:
    """Whether a forked process writes its `x` into a pipe."""
    return bool(select([pipe], [], [], SECONDS)[0]) and os.read(pipe, 1) == b"x"


def exitcode(child: int) -> int:
    """How a process ended: its exit status, or a signal's number, negated.

    Raises TimeoutError, and kills it, where it does not end: it may wait for a lock before it has limited itself.
    """
    deadline = time.monotonic() + 2 * SECONDS
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            end(child)
            raise TimeoutError(f"the forked process {child} hangs")
        time.sleep(0.001)
    return os.waitstatus_to_exitcode(ended[1])


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def end(child: int) -> None:
    """Kill a process of the test and wait for its end."""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
