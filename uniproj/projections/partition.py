"""P with one non-zero per row: the rows of theta_D are dealt out to the d columns."""

from __future__ import annotations

import torch
from torch import Tensor

from uniproj.errors import ProjectionError
from uniproj.kernels.permutation import permute
from uniproj.layout import LoRALayout
from uniproj.projection import Entries, Projection


def balanced_index(D: int, d: int, seed: int, stream: str) -> Tensor:
    """(D,) int64: row i belongs to column pi(i) mod d, pi a keyed permutation of the D rows.

    A uniform balanced shuffle: every column gets floor(D / d) or ceil(D / d) rows, anywhere in the model; the
    rows of column j are pi^-1(j), pi^-1(j + d), ..
    """
    return permute(torch.arange(D), D, seed, stream, torch.zeros(1, dtype=torch.long)) % d


class Partition(Projection):
    r"""theta_D[i] = theta_d[index[i]] / sqrt(n_j), j = index[i], n_j = #{i : index[i] = j}.

    One non-zero per row makes the columns orthogonal; dividing each by its norm makes P^T P = I_d exactly
    (whatever the index). With `normalise=False` the non-zeros are 1 and P^T P = diag(n_j).
    The scale is applied to the d numbers, before the gather; state is 4 D + 8 d bytes.

    Raises ProjectionError if a column is empty.
    """

    sparse = True

    def __init__(self, layout: LoRALayout, d: int, seed: int, index: Tensor, normalise: bool = True):
        super().__init__(layout, d, seed)
        counts = torch.bincount(index, minlength=d)
        if empty := int((counts == 0).sum()):
            raise ProjectionError(
                f"{self.name}: every column needs a row, {empty} of {d} are empty at D = {layout.D}. "
                "Lower d or use a balanced assignment."
            )
        scale = counts.double().rsqrt() if normalise else torch.ones(d, dtype=torch.float64)
        self.register_buffer("index", index.int(), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.index: Tensor
        self.scale: Tensor

    def _matvec(self, theta_d: Tensor) -> Tensor:
        return (theta_d * self.scale.to(theta_d.dtype)).index_select(1, self.index)

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        # one row of the batch at a time: index_add along a trailing axis is fifty times slower on the CPU
        sums = [theta_D.new_zeros(self.d).index_add(0, self.index, row) for row in theta_D]
        return torch.stack(sums) * self.scale.to(theta_D.dtype)

    def entries(self) -> Entries:
        columns = self.index.long()
        return torch.arange(self.D, device=columns.device), columns, self.scale[columns]
