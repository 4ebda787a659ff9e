"""The truncated SVD that LoRA-XS and TinyLoRA rest on."""

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
