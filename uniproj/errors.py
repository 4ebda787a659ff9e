"""The two errors a user of uniproj meets; every message says what was found, what was expected, what to do."""

import difflib
import reprlib
from collections.abc import Iterable

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80
_LONGEST = 160


def printable(text: object) -> str:
    r"""Text as one line of visible characters: all others (\n, escape codes, marks of direction) by their escapes.

    For whatever came from a file, before it reaches a terminal.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def shown(value: object) -> str:
    """A value as a sentence quotes it: as Python writes it, its middle left out where it is long."""
    try:
        text = _short.repr(value)
    except ValueError:  # Python refuses to write integers of thousands of digits
        return "a number of too many digits"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}..{text[-_LONGEST // 2 :]}"


class OneLineError(ValueError):
    """One line of visible characters, whatever file its parts are quoted from."""

    def __init__(self, message: object):
        super().__init__(printable(message))


class ProjectionError(OneLineError):
    """A projection was asked for something it cannot be: a wrong shape, d > D, an unknown name or option."""


class AdapterError(OneLineError):
    """An adapter cannot be attached or loaded: foreign file, other architecture, unsupported setting."""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The sentences for a name that nothing bears: the nearest ones, and all that are known."""
    known = sorted(known)
    near = difflib.get_close_matches(name[:80], known, n=3)
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"unknown {what} {shown(name)}. {hint}Known: {', '.join(known)}."
