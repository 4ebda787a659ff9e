"""The two errors a user of uniproj meets; every message says what was found, what was expected, what to do."""


class ProjectionError(ValueError):
    """A projection was asked for something it cannot be: a wrong shape, d > D, an unknown name or option."""


class AdapterError(ValueError):
    """An adapter cannot be attached or loaded: foreign file, other architecture, unsupported setting."""
