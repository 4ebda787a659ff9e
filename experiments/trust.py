"""Whose code a command runs beside this repository's: what its own words name, and nothing that a record does."""

from __future__ import annotations

import argparse

from experiments import models
from uniproj import plugins


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--plugins` and `--trust-remote-code`."""
    plugins.add_option(parser, "+")
    plugins.add_trust(parser)


def apply(args: argparse.Namespace) -> None:
    """Do what these options say. Raises ProjectionError for a plugin that cannot be imported."""
    plugins.load(args.plugins)
    models.trust_remote_code(args.trust_remote_code)


def words() -> list[str]:
    """The options by which another process may run what this one was told to."""
    code = ["--trust-remote-code"] if models.trusts_remote_code() else []
    return [*(f"--plugins={plugin}" for plugin in plugins.loaded()), *code]
