"""Means and interpolations of theta_d.

A warning that holds for all of them: theta_D = P theta_d + c is affine in theta_d, but the update of a module is the
product B A of two parts of theta_D, so the update of a mean is not the mean of the updates. It is exactly that mean
less the covariance of the factors,

    B_mean A_mean = mean_k(B_k A_k) - mean_k((B_k - B_mean)(A_k - A_mean)),

small where the vectors lie close together (checkpoints of one run, users who started from one vector), and of the size
of the updates themselves where they were trained apart. Measure what comes out before you use it.
"""

from __future__ import annotations

from torch import Tensor

from uniproj.errors import AdapterError
from uniproj.kernels.forms import widest


def mean(thetas: Tensor) -> Tensor:
    """The mean of K vectors, (K, d) -> (d,), in float64 where their device has it.

    Not the mean of their updates: B A is bilinear.

    Raises AdapterError for anything but a non-empty stack of vectors.
    """
    if thetas.ndim != 2 or not len(thetas):
        raise AdapterError(
            f"mean: thetas must have shape (K, d) with K >= 1, got {tuple(thetas.shape)}. Use bank.get_many(names)."
        )
    return thetas.to(widest(thetas.device)).mean(0).to(thetas.dtype)


def interpolate(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 - t) a + t b, of shape (d,): a at t = 0 and b at t = 1, exactly. Not a line of updates: B A is bilinear in it.

    Raises AdapterError for vectors of two shapes.
    """
    if a.shape != b.shape or a.ndim != 1:
        raise AdapterError(
            f"interpolate: a and b must be vectors of one length, got {tuple(a.shape)} and {tuple(b.shape)}. "
            "Take both from one bank."
        )
    wide = widest(a.device)
    return ((1 - t) * a.to(wide) + t * b.to(wide)).to(a.dtype)
