"""What all commands share: quiet libraries, progress, how facts are printed, and a reader who leaves."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ParamSpec

from tqdm import tqdm

from uniproj.errors import printable

READER_LEFT = 128 + signal.SIGPIPE
DONE = "done"
_Arguments = ParamSpec("_Arguments")


def quiet_bitsandbytes() -> None:
    """Drop the log message of bitsandbytes that it has no kernel for 4-bit products on the CPU.

    Call it before PEFT is imported, which imports bitsandbytes wherever it is installed, quantised model or not.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_useful)


def _is_useful(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Where standard error is a pipe or a file, no library draws a progress bar, even if it asks for one."""
    plain = tqdm.__init__

    def init(self: tqdm, *args: Any, **options: Any) -> None:
        plain(self, *args, **{**options, "disable": True})

    if not sys.stderr.isatty():
        tqdm.__init__ = init
    try:
        yield
    finally:
        tqdm.__init__ = plain


@contextmanager
def _visible_output() -> Iterator[None]:
    """Write invisible characters, and those that the encoding of standard output lacks, by their escapes."""
    stream = sys.stdout
    plain, encoding = stream.write, getattr(stream, "encoding", None) or "utf-8"

    def write(text: str) -> int:
        visible = "\n".join(map(printable, text.split("\n")))
        plain(visible.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    stream.write = write  # type: ignore[method-assign]
    try:
        yield
    finally:
        stream.write = plain  # type: ignore[method-assign]


def report(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print facts as JSON, or each on a line of its own."""
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for key, value in facts.items():
        shown = "-" if value is None else f"{value:.6g}" if isinstance(value, float) else printable(value)
        print(f"{key:20s} {shown}")


def add_upload(parser: argparse.ArgumentParser) -> None:
    """The arguments of a command that uploads: where to, and `uploading` of them."""
    parser.add_argument("repo", help="on the Hub: user/name")
    parser.add_argument("--base", help="name of the base model on the Hub, where the adapter does not know it")
    parser.add_argument("--private", action="store_true", help="make the repository private, if there is none yet")
    parser.add_argument("--dry-run", action="store_true", help="print what would go, and the card; send nothing")


def uploading(args: argparse.Namespace) -> dict[str, Any]:
    """What `uniproj.hub.upload` is asked for by these arguments."""
    return {"private": args.private or None, "dry_run": args.dry_run}


class Progress:
    """How many of `total` things are done: a bar on a terminal; elsewhere one line for each thing."""

    def __init__(self, what: str, total: int, done: int):
        self.what = what
        self.bar = tqdm(total=total, initial=done, desc=f"{what}s", unit=what, disable=None)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def ended(self, name: str, status: str = DONE) -> None:
        """Count one more, which ended so."""
        name, status = printable(name), printable(status)
        if self.bar.disable:
            self.bar.n += 1
            print(f"{self.bar.n} of {self.bar.total} {self.what}s: {name} {status}", file=sys.stderr, flush=True)
            return
        self.bar.update()
        if status != DONE:
            tqdm.write(f"{name} {status}", file=sys.stderr)


def _reader_left() -> bool:
    """Whether the reader of standard output has closed it."""
    watched = select.poll()
    # a pipe without a reader is reported whatever events are asked for
    watched.register(sys.stdout.fileno(), 0)
    return bool(watched.poll(0))


def command(main: Callable[_Arguments, int]) -> Callable[_Arguments, int]:
    """Decorator for the `main` of a command: progress bars on terminals only, visible characters only on standard
    output, and exit status 141 without a message when the reader of a pipe has left, as `| head` does."""

    @functools.wraps(main)
    def run(*args: _Arguments.args, **options: _Arguments.kwargs) -> int:
        quiet_bitsandbytes()
        try:
            with _bars_on_terminals_only(), _visible_output():
                try:
                    return main(*args, **options)
                finally:
                    sys.stdout.flush()
        except BrokenPipeError:
            if not _reader_left():
                raise
            # what is left in the buffer goes nowhere, or Python would complain at its exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return READER_LEFT

    return run
