"""The floors, and Uni-LoRA's P from PyTorch's own operators: theta_D[i] = theta_d[index[i]] scale[index[i]].

Each holds its own copy of what it needs. The scale is applied to d numbers before the gather and after the sum.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional as F

from analysis.overhead.problem import Candidate, Method, Problem, backward


def copy(problem: Problem) -> Method:
    """Copy D floats into memory that is there: what moving theta_D once must cost."""
    source, target = problem.y, torch.empty_like(problem.y)
    return Method(lambda: target.copy_(source), _nothing)


def clone(problem: Problem) -> Method:
    """The same into fresh memory, which every operator that returns a new theta_D must ask for."""
    source = problem.y
    return Method(lambda: source.clone(), _nothing)


def _nothing(_: Any) -> None:
    return None


def index_autograd(problem: Problem) -> Method:
    """x[index] with int64 indices, and its backward."""
    index = problem.index.clone().to(problem.device)
    theta_d, y, scale = problem.x.clone().requires_grad_(), problem.y, problem.scale
    return Method(lambda: (theta_d * scale)[index], lambda out: backward([out], [theta_d], [y]), [theta_d])


def index_select(problem: Problem) -> Method:
    """index_select forward and index_add_ back, with int32 indices."""
    index = problem.index.int().to(problem.device)
    x, y, scale = problem.x, problem.y, problem.scale

    def adjoint(_: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add_(0, index, y).mul_(scale)

    return Method(lambda: (x * scale).index_select(0, index), adjoint)


def sparse_csr(problem: Problem) -> Method:
    """P and P^T as torch.sparse CSR matrices with int32 indices, both built beforehand."""
    x, y = problem.x, problem.y
    columns = problem.index.int().numpy()
    values = problem.scale.cpu().numpy()[columns]
    rows = np.arange(problem.D + 1, dtype=np.int32)
    P = sparse.csr_matrix((values, columns, rows), shape=(problem.D, problem.d))
    T = P.tocsc()
    forth = _to_torch(P.indptr, P.indices, P.data, (problem.D, problem.d), problem.device)
    # the columns of P are the rows of P^T, so its CSC arrays are the CSR arrays of P^T
    back = _to_torch(T.indptr, T.indices, T.data, (problem.d, problem.D), problem.device)
    return Method(lambda: forth @ x, lambda _: back @ y)


def _to_torch(
    pointers: np.ndarray, indices: np.ndarray, values: np.ndarray, shape: tuple[int, int], device: torch.device
) -> Tensor:
    parts = [torch.from_numpy(array).to(device) for array in (pointers, indices, values)]
    return torch.sparse_csr_tensor(parts[0], parts[1], parts[2], shape, check_invariants=False)


def embedding_bag(problem: Problem) -> Method:
    """embedding_bag both ways: D bags of one row of theta_d, and d bags that sum rows of y."""
    x, y, scale, device = problem.x, problem.y, problem.scale, problem.device
    index = problem.index.int().to(device).unsqueeze(1)
    by_column = sparse.csr_matrix(
        (np.empty(problem.D, dtype=np.bool_), problem.index.int().numpy(), np.arange(problem.D + 1, dtype=np.int32)),
        shape=(problem.D, problem.d),
    ).tocsc()
    order = torch.from_numpy(by_column.indices).to(device)
    first = torch.from_numpy(by_column.indptr[:-1].copy()).to(device)

    def forward() -> Tensor:
        return F.embedding_bag(index, (x * scale).unsqueeze(1), mode="sum").squeeze(1)

    def adjoint(_: Tensor) -> Tensor:
        return F.embedding_bag(order, y.unsqueeze(1), first, mode="sum").squeeze(1).mul_(scale)

    return Method(forward, adjoint)


COPY, CLONE = "copy", "clone"
FLOORS = (Candidate(COPY, copy, 4), Candidate(CLONE, clone, 8))
PEERS = (
    Candidate("x[idx]", index_autograd, 32),
    Candidate("index_select", index_select, 12),
    Candidate("sparse CSR", sparse_csr, 64),
    Candidate("embedding_bag", embedding_bag, 48),
)
