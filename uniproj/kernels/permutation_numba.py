"""The rounds of a keyed permutation at one point, for the loops that Numba compiles."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import numba

from uniproj.kernels.permutation import ROUNDS


@numba.njit(cache=True)
def rounds(x, a, b, tables):
    """Where all rounds take a point of the a x b grid (see `permutation.py`)."""
    L = x // b
    R = x - L * b
    for t in range(0, ROUNDS, 2):
        R += tables[t * a + L]
        if b <= R:
            R -= b
        L += tables[(t + 1) * a + R]
        if a <= L:
            L -= a
    return L * b + R
