"""The columns of P, a few at a time, and what is summed over them: P is never whole in memory as a dense matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from uniproj import Projection

# Numbers of P at once: 128 MiB in float64.
AT_ONCE = 2**24


@torch.no_grad()
def blocks(P: Projection) -> Iterator[tuple[slice, Tensor]]:
    """(columns j to k, P^T's rows j to k as a dense (k - j, D) float64 matrix), one block after the other."""
    width = max(1, AT_ONCE // P.D)
    for first in range(0, P.d, width):
        columns = slice(first, min(first + width, P.d))
        E = torch.zeros(columns.stop - first, P.d, dtype=torch.float64, device=P.device)
        E[torch.arange(len(E)), torch.arange(first, columns.stop)] = 1.0
        yield columns, P.matvec(E)


def csr(P: Projection) -> scipy.sparse.csr_array:
    """A sparse P as SciPy's (D, d) matrix in float64. Raises ProjectionError for a dense one."""
    rows, columns, values = (part.detach().cpu().numpy() for part in P.entries())
    return scipy.sparse.csr_array((values, (rows, columns)), shape=P.shape)


@torch.no_grad()
def gram(P: Projection) -> Tensor:
    """P^T P, (d, d) float64."""
    if P.sparse:
        M = csr(P)
        return torch.from_numpy((M.T @ M).toarray())
    G = torch.empty(P.d, P.d, dtype=torch.float64)
    for columns, part in blocks(P):
        G[:, columns] = P.rmatvec(part).T.cpu()
    return G


def coherence(G: Tensor) -> float:
    """The largest |cosine| of two columns of P, from G = P^T P."""
    lengths = G.diagonal().clamp_min(0.0).sqrt()
    cosines = (G - torch.diag(G.diagonal())).abs() / torch.outer(lengths, lengths).clamp_min(1e-300)
    return float(cosines.max())


def singular_values(G: Tensor) -> Tensor:
    """Those of P, the least first, from G = P^T P."""
    return torch.linalg.eigvalsh(G).clamp_min(0.0).sqrt()


@dataclass(frozen=True)
class Loads:
    """Where P's entries are: non-zeros per row (D,), per column (d,), and the squared entries of each column summed
    over the rows of each block of the layout, a sparse (blocks, d) matrix; squares summed per row (D,)."""

    per_row: np.ndarray
    per_column: np.ndarray
    energy: scipy.sparse.csr_array
    row_energy: np.ndarray


def loads(P: Projection) -> Loads:
    """Count P's entries from its sparse form, or column by column."""
    return _of_sparse(P) if P.sparse else _of_dense(P)


def _of_sparse(P: Projection) -> Loads:
    M = csr(P)
    M.eliminate_zeros()
    squares = M.multiply(M).tocsr()
    sizes = [block.numel for block in P.layout.blocks]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    members = scipy.sparse.csr_array((np.ones(P.D), (owner, np.arange(P.D))), shape=(len(sizes), P.D))
    per_column = np.bincount(M.indices, minlength=P.d)
    return Loads(np.diff(M.indptr), per_column, (members @ squares).tocsr(), np.asarray(squares.sum(axis=1)).ravel())


def _of_dense(P: Projection) -> Loads:
    per_row, row_energy = np.zeros(P.D, dtype=np.int64), np.zeros(P.D)
    per_column, energy = [], []
    for _, part in blocks(P):
        hit, squares = part != 0, part**2
        per_row += hit.sum(0).cpu().numpy()
        row_energy += squares.sum(0).cpu().numpy()
        per_column.append(hit.sum(1).cpu().numpy())
        pieces = squares.split([block.numel for block in P.layout.blocks], dim=1)
        energy.append(scipy.sparse.csr_array(torch.stack([piece.sum(1) for piece in pieces]).cpu().numpy()))
    return Loads(per_row, np.concatenate(per_column), scipy.sparse.hstack(energy).tocsr(), row_energy)
