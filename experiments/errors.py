"""The one error that a researcher's input can cause in the experiments."""


class ExperimentError(ValueError):
    """Unknown names, unreadable data, damaged results: the message says what to do next."""
