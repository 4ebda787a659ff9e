"""Claims are decided by measurement: each check accepts a matrix that has the property and rejects one that has not."""

import pytest
import torch

from uniproj import LoRALayout, build, get, names
from uniproj.claims import CHECKS, isometry_error
from uniproj.testing import sample

LAYOUT = LoRALayout.from_shapes({f"h.{i}.{m}": (9, 6) for i in range(4) for m in ("q", "v")}, r=2)
TRUE_OF = {
    "linear": ("unilora", "sparse"),
    "affine": ("nola", "unilora"),
    "isometric": ("unilora", "unilora_unnormalised"),
    "orthogonal": ("vera", "gaussian"),
    "isometric_in_expectation": ("fastfood", "nola"),
    "uniform": ("unilora", "unilora_nonuniform"),
    "local": ("vera", "unilora"),
    "global_sharing": ("unilora", "vera"),
    "separates_factors": ("unilora_nonuniform", "unilora"),
}


def test_every_claim_has_a_check_and_an_example() -> None:
    claimed = {claim for name in names() for claim in (*get(name).claims, *get(name).claims_if)}
    assert claimed == set(CHECKS) == set(TRUE_OF)


@pytest.mark.parametrize("claim", TRUE_OF)
def test_check_separates_those_that_have_it_from_those_that_have_not(claim: str) -> None:
    has, has_not = TRUE_OF[claim]
    assert CHECKS[claim](sample(has, LAYOUT, 40)).holds
    assert not CHECKS[claim](sample(has_not, LAYOUT, 40)).holds


@pytest.mark.parametrize(
    ("name", "D", "d", "expected"),
    [
        ("unilora_unnormalised", 400, 20, 19.0),  # P^T P = (D / d) I
        ("unilora_unnormalised", 401, 20, 20.0),  # one column serves ceil(D / d) = 21 rows
        ("unilora", 400, 20, 0.0),
        ("fastfood_sign", 512, 64, 0.0),
        ("gaussian_orthonormal", 90, 11, 0.0),
    ],
)
def test_isometry_error_has_the_known_value(name: str, D: int, d: int, expected: float) -> None:
    assert isometry_error(build(name, D, d)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", names())
def test_isometry_error_equals_the_dense_gram_matrix(name: str, monkeypatch) -> None:
    monkeypatch.setattr("uniproj.claims._COLUMNS", 7)
    P = sample(name, LAYOUT, 40, **get(name).variants[0])
    M = P.to_dense().detach()
    expected = (M.T @ M - torch.eye(P.d)).abs().max()
    assert isometry_error(P) == pytest.approx(float(expected), rel=1e-9, abs=1e-12)


def test_marchenko_pastur_edges_of_the_gaussian() -> None:
    s = torch.linalg.svdvals(build("gaussian", 4096, 240).to_dense())
    edge = (240 / 4096) ** 0.5
    assert s.min() == pytest.approx(1 - edge, abs=0.02) and s.max() == pytest.approx(1 + edge, abs=0.02)


def test_fastfood_is_less_isometric_than_a_gaussian() -> None:
    spread = {n: torch.linalg.svdvals(build(n, 4096, 240).to_dense()) for n in ("fastfood", "gaussian")}
    assert spread["fastfood"].max() > spread["gaussian"].max() > 1.2
    assert spread["fastfood"].min() < spread["gaussian"].min() < 0.8


def test_plain_and_exclusive_sparse_columns() -> None:
    """Eigenvalues of the Gram matrix are 1 +- sqrt(m_j / n_j), m_j of column j's n_j rows being in S."""
    P = build("unilora_sparse", 400, 26, seed=3)
    M = P.to_dense()
    iso, selected = M[:, : 26 - P.k], M[:, 26 - P.k :].sum(1) > 0
    n, m = (iso != 0).sum(0).double(), (iso[selected] != 0).sum(0).double()
    eigenvalues = torch.linalg.eigvalsh(M.T @ M)
    assert eigenvalues.max() == pytest.approx(float(1 + (m / n).sqrt().max()), abs=1e-10)
    assert isometry_error(build("unilora_sparse", 400, 26, seed=3, exclusive=True)) < 1e-12


def test_tied_factors_of_equal_shape_are_a_scaled_isometry() -> None:
    M = sample("tied_lora", LAYOUT, trained="AB", group="all").to_dense()
    torch.testing.assert_close(M.T @ M, 8 * torch.eye(M.shape[1]).double())


def test_other_seeds_give_another_P() -> None:
    fixed = {"lora", "lora_xs"}  # the identity, and singular vectors of the base weights
    for name in sorted(set(names()) - fixed):
        P = sample(name, LAYOUT, 40, **get(name).variants[0])
        other = P.rebuild(seed=P.seed + 1)
        same = torch.equal(P.to_dense(), other.to_dense())
        assert not same or name == "tied_lora", name  # with everything trained its P starts at ones
