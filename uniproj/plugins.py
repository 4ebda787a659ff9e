"""Third-party code that a command may run: a user's projections, and code that comes with a base model.

Only a command line or a sweep file can name such code; a saved adapter or the record of a run cannot.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from uniproj.errors import ProjectionError


def add_option(parser: argparse.ArgumentParser, at_once: int | str = 1) -> None:
    """The option `--plugins`, which may be repeated; at_once="+" takes several, if no positional argument follows."""
    help = "modules or Python files that register projections, formats or figures of your own"
    parser.add_argument("--plugins", nargs=at_once, action="extend", default=[], metavar="FILE", help=help)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """The option `--trust-remote-code`."""
    help = "run the Python code that comes with a base model; read it first"
    parser.add_argument("--trust-remote-code", action="store_true", help=help)


def discover(package: str, group: str, register: Callable[[str], Callable[[Any], object]]) -> None:
    """Import every file of a package without a leading underscore, which register themselves, and register what the
    entry points of a group name; of one that cannot be loaded a warning."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{package}.{module.name}")
    for entry in importlib.metadata.entry_points(group=group):
        try:
            register(entry.name)(entry.load())
        except Exception as error:  # somebody else's package must not take ours down
            warnings.warn(f"{group}: {entry.name!r} of {entry.value} cannot be loaded: {error!r}", stacklevel=2)


_loaded: dict[str, None] = {}


def loaded() -> list[str]:
    """The plugins that this process imported, to be passed on to a process that it starts."""
    return list(_loaded)


def load(plugins: Iterable[str]) -> None:
    """Import each plugin, a .py file or the name of an installed module, once per process.

    It registers its projections, formats or figures. Raises ProjectionError if it cannot be imported.
    """
    for plugin in plugins:
        try:
            _load_file(Path(plugin)) if plugin.endswith(".py") else importlib.import_module(plugin)
        except (Exception, SystemExit) as error:  # anything may go wrong in somebody else's file
            raise ProjectionError(
                f"plugins: {plugin} must be a Python file or module that can be imported, got {error!r}. Repair it."
            ) from error
        _loaded[os.path.abspath(plugin) if plugin.endswith(".py") else plugin] = None


def _load_file(path: Path) -> None:
    name = f"uniproj_plugin_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
