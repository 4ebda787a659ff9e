"""The two errors a user of uniproj meets; every message says what was found, what was expected, what to do."""

import difflib
from collections.abc import Iterable


class ProjectionError(ValueError):
    """A projection was asked for something it cannot be: a wrong shape, d > D, an unknown name or option."""


class AdapterError(ValueError):
    """An adapter cannot be attached or loaded: foreign file, other architecture, unsupported setting."""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The sentences for a name that nothing bears: the nearest ones, and all that are known."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"unknown {what} {name!r}. {hint}Known: {', '.join(known)}."
