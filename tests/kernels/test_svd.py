"""The truncated SVD that LoRA-XS and TinyLoRA rest on."""

import pytest
import torch

from uniproj.kernels.svd import truncated_svd


def test_the_randomised_svd_equals_the_exact_one(monkeypatch) -> None:
    torch.manual_seed(1)
    W = torch.randn(90, 70, dtype=torch.float64) @ torch.diag(0.8 ** torch.arange(70).double())
    exact = truncated_svd(W, 5, 0)
    monkeypatch.setattr("uniproj.kernels.svd.EXACT", 10)
    for ours, theirs in zip(truncated_svd(W, 5, 0), exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    U, _, _ = exact
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize(("out", "inside"), [(60, 90), (90, 60), (70, 70)])
@pytest.mark.parametrize("smallest", [1.0, 0.5, 1e-4, 1e-9])
def test_any_spectrum_gives_its_singular_vectors(out: int, inside: int, smallest: float) -> None:
    """W made of known singular vectors; `smallest` is the last of the five singular values asked for."""
    generator = torch.Generator().manual_seed(out)
    U, V = (torch.linalg.qr(torch.randn(n, 40, dtype=torch.float64, generator=generator)).Q for n in (out, inside))
    S = torch.tensor([4.0, 3.0, 2.0, 1.5, smallest, *[0.4 * smallest] * 35], dtype=torch.float64)
    ours = truncated_svd(U * S @ V.T, 5, 0)
    torch.testing.assert_close(ours[1], S[:5], rtol=0, atol=1e-14)
    # of one sign each
    terms = torch.einsum("ik,k,kj->kij", *ours)
    torch.testing.assert_close(terms, torch.einsum("ik,k,jk->kij", U, S, V)[:5], rtol=0, atol=1e-13)
    torch.testing.assert_close(
        (ours[0] * U[:, :5]).sum(0).abs(), torch.ones_like(S[:5]), rtol=0, atol=(1e-15 / smallest) ** 2 + 1e-13
    )


@pytest.mark.parametrize("S", [[1] * 40, [4, 2, 2, *[1] * 37], [5, 4, 3, 3, *[1] * 36]])
def test_equal_singular_values_have_the_vectors_of_the_full_decomposition(S: list[float]) -> None:
    """Which of them are taken is arbitrary, and part of every P that was saved."""
    left, right = (torch.linalg.qr(torch.randn(n, 40, dtype=torch.float64)).Q for n in (40, 60))
    W = left * torch.tensor(S) @ right.T
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    for ours, theirs in zip(truncated_svd(W, 3, 0)[::2], (U[:, :3], Vh[:3]), strict=True):
        assert torch.equal(ours.abs(), theirs.abs())


def test_a_weight_of_zeros_has_orthonormal_factors() -> None:
    U, S, Vh = truncated_svd(torch.zeros(5, 7), 3, 0)
    assert not S.any()
    for gram in (U.T @ U, Vh @ Vh.T):
        torch.testing.assert_close(gram, torch.eye(3, dtype=torch.float64))


def test_a_weight_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="non-finite"):
        truncated_svd(torch.full((4, 4), float("nan")), 2, 0)
