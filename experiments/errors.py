"""The one error that a researcher's input can cause in the experiments."""

from uniproj.errors import OneLineError


class ExperimentError(OneLineError):
    """Unknown names, unreadable data, damaged results: the message says what to do next."""
