"""What all commands share: a reader who leaves, progress on terminals only, libraries that keep quiet."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import pytest
from tqdm import tqdm

import analysis
import experiments
from tests.format.fixtures import ROOT as FIXTURES
from uniproj import console

GEMM = "Failed to load CPU gemm_4bit_forward from kernels-community: %s"


@contextmanager
def unread() -> Iterator[TextIO]:
    """A pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        yield pipe


def little() -> int:
    print("a line that stays in the buffer until the end")
    return 0


def much() -> int:
    print("x" * 10**6)
    raise AssertionError("it went on")


def usage() -> int:
    print("usage")
    raise SystemExit(0)


@pytest.mark.parametrize("main", [little, much, usage])
def test_a_command_whose_reader_left_ends_without_a_word(main, monkeypatch: pytest.MonkeyPatch) -> None:
    with unread() as stdout, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stdout)
        assert console.command(main)() == console.READER_LEFT == 141


def test_a_pipe_of_its_own_that_breaks_is_an_error() -> None:
    @console.command
    def broken() -> int:
        raise BrokenPipeError("a worker's")

    with pytest.raises(BrokenPipeError, match="worker"):
        broken()


def test_a_process_that_imports_peft_and_whose_reader_left_says_nothing() -> None:
    command = [sys.executable, "-m", "uniproj", "inspect", str(FIXTURES / "v3" / "unilora")]
    with unread() as stdout:
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")


class Terminal(io.StringIO):
    """Standard error that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stderr", "shown"), [(io.StringIO(), False), (Terminal(), True)])
def test_bars_of_any_library_are_for_terminals(stderr: io.StringIO, shown: bool, monkeypatch) -> None:
    class OfALibrary(tqdm):
        pass

    @console.command
    def main() -> int:
        for _ in OfALibrary(range(3), disable=False, desc="loading"):
            pass
        return 0

    monkeypatch.setattr(sys, "stderr", stderr)
    assert main() == 0
    assert ("loading" in stderr.getvalue()) == shown
    list(tqdm(range(3), desc="a caller's own"))
    assert "a caller's own" in stderr.getvalue()


def test_bitsandbytes_says_no_more_than_is_of_use(caplog: pytest.LogCaptureFixture) -> None:
    assert analysis.__doc__ and experiments.__doc__  # importing them was enough
    said = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with caplog.at_level(logging.WARNING):
        said.warning(GEMM, "No module named 'kernels'")
        said.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for stderr, expected in ((io.StringIO(), "2 of 3 runs: a done\n3 of 3 runs: b failed\n"), (Terminal(), None)):
        monkeypatch.setattr(sys, "stderr", stderr)
        with console.Progress("run", 3, 1) as progress:
            progress.ended("a")
            progress.ended("b", "failed")
        shown = stderr.getvalue()
        assert shown == expected or (expected is None and "3/3" in shown and "b failed" in shown)
