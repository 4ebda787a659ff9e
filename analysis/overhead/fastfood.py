"""Fastfood written with PyTorch's own operators, around any function that computes H x along the last axis.

theta_D = first D rows of [H G_b Pi_b H B_b]_b (theta_d, 0) / sqrt(n D), n the power of two at or above d. The signs,
the permutation and the Gaussian diagonal of every block are drawn once and held: 16 bytes per row.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from analysis.overhead.problem import SEED, Candidate, Method, Problem

Transform = Callable[[Tensor], Tensor]


def butterfly(x: Tensor) -> Tensor:
    """H x along the last axis in log2 n passes of one addition and one subtraction, between two buffers."""
    n, half = x.shape[-1], 1
    source, target = x, torch.empty_like(x)
    spare = torch.empty_like(x)
    while half < n:
        pairs, sums = (t.view(-1, n // (2 * half), 2, half) for t in (source, target))
        torch.add(pairs[:, :, 0], pairs[:, :, 1], out=sums[:, :, 0])
        torch.sub(pairs[:, :, 0], pairs[:, :, 1], out=sums[:, :, 1])
        source, target, spare = target, spare, target
        half *= 2
    return source


def fastfood(problem: Problem, hadamard: Transform) -> Method:
    """Fastfood and its adjoint with this transform."""
    D, d, x, y = problem.D, problem.d, problem.x, problem.y
    n = 1 << (d - 1).bit_length()
    blocks = -(-D // n)
    generator = torch.Generator().manual_seed(SEED)
    B = torch.randint(0, 2, (blocks, n), generator=generator).mul_(2).sub_(1).float().to(problem.device)
    G = torch.randn(blocks, n, generator=generator).to(problem.device)
    Pi = torch.stack([torch.randperm(n, generator=generator) for _ in range(blocks)]).to(problem.device)
    scale = (n * D) ** -0.5

    def forward() -> Tensor:
        z = hadamard(F.pad(x, (0, n - d)) * B)
        return hadamard(z.gather(1, Pi).mul_(G)).view(-1)[:D] * scale

    def adjoint(_: Tensor) -> Tensor:
        z = hadamard(F.pad(y, (0, blocks * n - D)).view(blocks, n)).mul_(G)
        z = hadamard(torch.empty_like(z).scatter_(1, Pi, z))
        return z.mul_(B).sum(0)[:d] * scale

    return Method(forward, adjoint)


def _packaged(problem: Problem) -> Method:
    """With the CUDA kernel of the package fast-hadamard-transform."""
    return fastfood(problem, importlib.import_module("fast_hadamard_transform").hadamard_transform)


BUTTERFLY = Candidate("butterfly", lambda problem: fastfood(problem, butterfly), 48)
PACKAGE = Candidate("fast-hadamard-transform", _packaged, 40)
