"""Keyed bijections and Hadamard transforms."""

import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from uniproj.kernels.hadamard import hadamard, hadamard_matrix
from uniproj.kernels.permutation import permute
from uniproj.kernels.svd import truncated_svd
from uniproj.projections.partition import balanced_index


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63), part=st.integers(0, 40))
def test_permute_is_a_bijection(n: int, seed: int, part: int) -> None:
    images = permute(torch.arange(n), n, seed, "p", torch.tensor([part]))
    assert torch.equal(images.sort().values, torch.arange(n))


@given(n=st.integers(2, 500), start=st.integers(0, 400))
def test_permute_has_random_access(n: int, start: int) -> None:
    x = torch.arange(start % n, n)
    part = torch.full_like(x, 2)
    assert torch.equal(permute(x, n, 5, "p", part), permute(torch.arange(n), n, 5, "p", torch.tensor([2]))[start % n :])


@given(D=st.integers(1, 4000), d=st.integers(1, 4000), seed=st.integers(0, 2**40))
def test_the_partition_is_balanced(D: int, d: int, seed: int) -> None:
    d = min(d, D)
    counts = torch.bincount(balanced_index(D, d, seed, "s"), minlength=d)
    assert counts.min() == D // d and counts.max() == -(-D // d)


def test_images_are_uniform_and_blocks_independent() -> None:
    """chi-squared over images of one point in many blocks, and over pairs of neighbouring points."""
    n, blocks = 23, 8000
    x = torch.arange(n).expand(blocks, n)
    images = permute(x, n, 1, "p", torch.arange(blocks).unsqueeze(1))
    assert scipy.stats.chisquare(torch.bincount(images[:, 7], minlength=n)).pvalue > 1e-3
    step = torch.bincount((images[:, 8] - images[:, 7]) % n, minlength=n)[1:]
    assert scipy.stats.chisquare(step).pvalue > 1e-3
    across = torch.bincount((images[1:, 3] - images[:-1, 3]) % n, minlength=n)
    assert scipy.stats.chisquare(across).pvalue > 1e-3


def test_rows_of_a_factor_show_no_structure() -> None:
    """Singular values of a reconstructed A equal those of an i.i.d. one in distribution (Kolmogorov-Smirnov)."""
    d, shape = 2000, (64, 625)
    theta = torch.randn(d, dtype=torch.float64)
    A = theta[balanced_index(20 * d, d, 3, "s")].view(shape)
    reference = torch.randn(shape, dtype=torch.float64)
    ours, theirs = torch.linalg.svdvals(A), torch.linalg.svdvals(reference)
    assert scipy.stats.ks_2samp(ours / ours.norm(), theirs / theirs.norm()).pvalue > 1e-3
    # pairs of equal columns within a row of A: C(625, 2) pairs, each equal with probability 1/d (1 - d/D)
    columns = balanced_index(20 * d, d, 3, "s").view(shape)
    counts = torch.stack([torch.bincount(row, minlength=d) for row in columns])
    pairs = (counts * (counts - 1) // 2).sum()
    expected = shape[0] * shape[1] * (shape[1] - 1) / 2 / d * (1 - 1 / 20)
    assert abs(pairs - expected) < 5 * expected**0.5


@pytest.mark.parametrize("log2_n", range(0, 15))
def test_hadamard_squares_to_n(log2_n: int) -> None:
    n = 1 << log2_n
    x = torch.randn(3, n, dtype=torch.float64)
    torch.testing.assert_close(hadamard(hadamard(x)), n * x, rtol=1e-12, atol=1e-9)
    if log2_n <= 9:
        H = torch.from_numpy(scipy.linalg.hadamard(n)).double()
        assert torch.equal(hadamard_matrix(log2_n), H)
        torch.testing.assert_close(hadamard(x), x @ H.T, rtol=1e-12, atol=1e-10)


def test_the_randomised_svd_equals_the_exact_one(monkeypatch) -> None:
    torch.manual_seed(1)
    W = torch.randn(90, 70, dtype=torch.float64) @ torch.diag(0.8 ** torch.arange(70).double())
    exact = truncated_svd(W, 5, 0)
    monkeypatch.setattr("uniproj.kernels.svd.EXACT", 10)
    for ours, theirs in zip(truncated_svd(W, 5, 0), exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    U, _, _ = exact
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
