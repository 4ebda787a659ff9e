"""Keyed bijections: the specification in plain integers, and statistics that a weaker network fails."""

import math
from collections.abc import Callable

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from uniproj.kernels import permutation
from uniproj.kernels.permutation import MOST, permute, round_tables
from uniproj.kernels.random import bits


def by_the_specification(x: int, n: int, seed: int, stream: str, part: int) -> int:
    a = math.isqrt(n - 1) + 1 if n > 1 else 1
    b = math.ceil(n / a)

    def F(t: int, v: int) -> int:
        word = int(bits(seed, stream, 1, start=(6 * part + t) * a + v))
        return (b if t % 2 == 0 else a) * word // 2**32

    while True:
        L, R = divmod(x, b)
        for t in range(6):
            if t % 2 == 0:
                R = (R + F(t, L)) % b
            else:
                L = (L + F(t, R)) % a
        x = L * b + R
        if x < n:
            return x


@given(n=st.integers(1, 300), seed=st.integers(0, 2**64 - 1), part=st.integers(0, 5), data=st.data())
def test_permute_follows_its_specification(n: int, seed: int, part: int, data: st.DataObject) -> None:
    x = data.draw(st.integers(0, n - 1))
    found = permute(torch.tensor([x]), n, seed, "p", torch.tensor([part]))
    assert int(found) == by_the_specification(x, n, seed, "p", part)


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63), part=st.integers(0, 40))
def test_permute_is_a_bijection(n: int, seed: int, part: int) -> None:
    images = permute(torch.arange(n), n, seed, "p", torch.tensor([part]))
    assert torch.equal(images.sort().values, torch.arange(n))


def test_a_large_permutation_is_a_bijection_on_any_number_of_threads(set_threads: Callable[[int], None]) -> None:
    n = 1_000_003
    set_threads(2)
    images = permute(torch.arange(n), n, 1, "p")
    set_threads(1)
    assert torch.equal(images, permute(torch.arange(n), n, 1, "p"))
    assert torch.equal(images.sort().values, torch.arange(n))


@given(n=st.integers(2, 500), start=st.integers(0, 400))
def test_permute_has_random_access(n: int, start: int) -> None:
    x = torch.arange(start % n, n)
    part = torch.full_like(x, 2)
    assert torch.equal(permute(x, n, 5, "p", part), permute(torch.arange(n), n, 5, "p", torch.tensor([2]))[start % n :])


@pytest.mark.parametrize("n", [0, MOST + 1])
def test_what_does_not_fit_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match="Split the rows into groups"):
        round_tables(n, 0, "p")


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


def equal_bucket_z(width: int, rows: int, d: int, seed: int) -> tuple[float, float]:
    """How many deviations the pairs of equal buckets within the rows, and columns, of a factor lie off.

    Expected of a balanced shuffle: each pair of entries is equal with probability sum n_j (n_j - 1) / (D (D - 1)).
    """
    D = width * rows
    buckets = permute(torch.arange(D), D, seed, "p").remainder(d).view(rows, width)
    n = torch.bincount(buckets.flatten(), minlength=d).double()
    chance = float((n * (n - 1)).sum() / (D * (D - 1)))

    def z(lines: torch.Tensor) -> float:
        length = lines.shape[1]
        ordered = (lines + d * torch.arange(len(lines)).unsqueeze(1)).flatten()
        counts = torch.bincount(ordered).double()
        expected = chance * len(lines) * length * (length - 1) / 2
        return (float((counts * (counts - 1)).sum()) / 2 - expected) / expected**0.5

    return z(buckets), z(buckets.T.contiguous())


# width = b puts every row of the factor on one line of the network's grid: its worst case
SHAPES = [(512, 512, 4096), (768, 96, 1000), (1024, 256, 300), (500, 333, 7919)]


@pytest.mark.parametrize(("width", "rows", "d"), SHAPES)
def test_equal_buckets_fall_into_rows_and_columns_as_by_chance(width: int, rows: int, d: int) -> None:
    for seed in range(5):
        along, across = equal_bucket_z(width, rows, d, seed)
        assert abs(along) < 5 and abs(across) < 5


def test_the_statistics_see_a_network_with_too_few_rounds(monkeypatch) -> None:
    monkeypatch.setattr(permutation, "ROUNDS", 2)
    assert max(abs(z) for shape in SHAPES for z in equal_bucket_z(*shape, seed=0)) > 50


def test_rows_of_a_factor_show_no_structure() -> None:
    """Singular values of a reconstructed A equal those of an i.i.d. one in distribution (Kolmogorov-Smirnov)."""
    torch.manual_seed(0)
    d, shape = 2000, (64, 625)
    theta = torch.randn(d, dtype=torch.float64)
    A = theta[permute(torch.arange(20 * d), 20 * d, 3, "p") % d].view(shape)
    reference = torch.randn(shape, dtype=torch.float64)
    ours, theirs = torch.linalg.svdvals(A), torch.linalg.svdvals(reference)
    assert scipy.stats.ks_2samp(ours / ours.norm(), theirs / theirs.norm()).pvalue > 1e-3
