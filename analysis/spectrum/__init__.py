"""Singular values of P, and of the A, B and delta W that it produces."""

from analysis.spectrum.measure import of_projection, of_updates, spectrum

__all__ = ["of_projection", "of_updates", "spectrum"]
