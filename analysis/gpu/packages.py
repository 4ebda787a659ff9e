"""What must be installed, looked up by the standard library alone, before anything else is imported."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PROJECT = Path(__file__).parent.parent.parent / "pyproject.toml"
# the kernels and their tests
_BESIDE = ("triton", "pytest")


def missing(needed: Iterable[str] | None = None) -> list[str]:
    """Of the needed packages (those that uniproj declares, Triton and pytest), what there is and what is asked for.

    needed: lines as in `dependencies` of pyproject.toml.
    """
    if needed is None:
        needed = [*tomllib.loads(_PROJECT.read_text())["project"]["dependencies"], *_BESIDE]
    found = {line: _installed(re.split(r"[^\w.-]", line)[0]) for line in needed}
    if absent := [f"{line} (not installed)" for line, have in found.items() if have is None]:
        return absent
    from packaging.requirements import Requirement  # PEFT, Transformers and pytest require it

    return [
        f"{line} (found {have})"
        for line, have in found.items()
        if have and not Requirement(line).specifier.contains(have, prereleases=True)
    ]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
