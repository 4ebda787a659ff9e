"""Means and interpolations of theta_d, and how far their updates are from those one may expect."""

import pytest
import torch

import uniproj
from tests.bank.models import D, vector
from uniproj import AdapterError, LoRALayout
from uniproj.bank import interpolate, mean


def test_the_mean_of_vectors_misses_the_mean_of_updates_by_their_covariance() -> None:
    P = uniproj.build("unilora", layout=LoRALayout.from_shapes({"a": (12, 9)}, 4), d=D)
    thetas = torch.stack([vector(i) for i in range(3)]).double()
    B, A = P.layout.split(P(thetas))[:2]
    B_mean, A_mean = P.layout.split(P(mean(thetas)))[:2]
    covariance = ((B - B.mean(0)) @ (A - A.mean(0))).mean(0)
    torch.testing.assert_close(B_mean @ A_mean, (B @ A).mean(0) - covariance)
    assert covariance.norm() > 0.1 * (B @ A).mean(0).norm()


def test_interpolation_meets_its_ends_and_moves_in_a_line() -> None:
    a, b = vector(0), vector(1)
    assert torch.equal(interpolate(a, b, 0.0), a) and torch.equal(interpolate(a, b, 1.0), b)
    torch.testing.assert_close(interpolate(a, b, 0.25), torch.lerp(a, b, 0.25))
    torch.testing.assert_close(mean(torch.stack([a, b])), interpolate(a, b, 0.5))
    assert mean(torch.stack([a, b])).dtype == torch.float32
    with pytest.raises(AdapterError, match="vectors of one length"):
        interpolate(a, b[1:], 0.5)
    with pytest.raises(AdapterError, match=r"shape \(K, d\) with K >= 1, got \(60,\)"):
        mean(a)
