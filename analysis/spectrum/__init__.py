"""Singular values of P, and of the A, B and delta W that it produces."""

from analysis.spectrum.measure import of_factors, of_projection, spectrum

__all__ = ["of_factors", "of_projection", "spectrum"]
