"""Truncated singular value decomposition that is a pure function of (W, r, seed)."""

from __future__ import annotations

import torch
from torch import Tensor

from uniproj.kernels.random import normal

EXACT = 1024  # up to this smaller side the full decomposition is taken
_OVERSAMPLING = 8
_POWER_ITERATIONS = 10


def truncated_svd(W: Tensor, r: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), S (r,), Vh (r, in) of the r largest singular values of W (out, in), float64.

    The signs are fixed by making the entry of largest modulus of every column of U positive. Beyond `EXACT`,
    a randomised subspace iteration (Halko, Martinsson, Tropp 2011, algorithm 4.4) with our own Gaussian draw.
    """
    W = W.detach().double()
    if min(W.shape) <= max(EXACT, r):
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        k = min(r + _OVERSAMPLING, min(W.shape))
        start = normal(seed, "svd", W.shape[1] * k).double().view(-1, k).to(W.device)
        Q = torch.linalg.qr(W @ start).Q
        for _ in range(_POWER_ITERATIONS):
            Q = torch.linalg.qr(W @ torch.linalg.qr(W.T @ Q).Q).Q
        small, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
        U = Q @ small
    U, S, Vh = U[:, :r], S[:r], Vh[:r]
    flip = torch.sign(U.gather(0, U.abs().argmax(0, keepdim=True))).where(S > 0, 1.0)
    return U * flip, S, Vh * flip.T
