"""Adapters on disk: what a file says of itself, how it is read, written, compared and converted."""
