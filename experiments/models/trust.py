"""Which code of others a command runs: what its own command line names, never what a record names."""

from __future__ import annotations

import argparse

from uniproj import plugins

# whether Python code that comes with a model may run in this process; no setting of a run says so
_trusted = False


def trust_remote_code(given: bool) -> None:
    """Let this process run the code that comes with models, if `given`: `--trust-remote-code` of its command line."""
    global _trusted
    _trusted = _trusted or given


def trusts_remote_code() -> bool:
    """Whether it may."""
    return _trusted


def add_options(parser: argparse.ArgumentParser, at_once: int | str = "+") -> None:
    """`--plugins`, with so many files behind it, and `--trust-remote-code`."""
    plugins.add_option(parser, at_once)
    plugins.add_trust(parser)


def apply(args: argparse.Namespace) -> None:
    """Do what these options say. Raises ProjectionError for a plugin that cannot be imported."""
    plugins.load(args.plugins)
    trust_remote_code(args.trust_remote_code)


def words() -> list[str]:
    """The options by which another process may run what this one was told to."""
    code = ["--trust-remote-code"] if trusts_remote_code() else []
    return [*(f"--plugins={plugin}" for plugin in plugins.loaded()), *code]
