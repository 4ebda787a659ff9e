"""How the rows of theta_D are dealt out to columns, without a table of D entries.

The rows fall into groups (one for Uni-LoRA, one per layer or per factor for its ablations). Position q of a row is its
place when the groups stand one after the other; within a group of n rows and d_g columns the row at place x
belongs to column first_column + (pi(x) mod d_g), pi a keyed permutation of [0, n). So each column has floor(n / d_g) or
ceil(n / d_g) rows, and the rows of column j are pi^-1(j), pi^-1(j + d_g), ..
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from uniproj.kernels.dispatch import run
from uniproj.kernels.permutation import ROUNDS, evaluate, grid, tables_of_all
from uniproj.kernels.threads import cut, in_parallel

_CHUNK = 2**15
# of a group: first position, rows, columns, first column, b and start of its tables, a, and what divides by b and by
# the columns (`_divisor`)
FIELDS = 11


@dataclass(frozen=True)
class Group:
    """Rows (slices of theta_D, in order) that share `columns` columns, dealt by the stream of that name."""

    rows: Sequence[slice]
    columns: int
    stream: str

    @property
    def size(self) -> int:
        return sum(piece.stop - piece.start for piece in self.rows)


@dataclass(frozen=True)
class Deal:
    """The groups as small tensors that a kernel reads.

    by_row (s, 2): first row and first position of each contiguous piece, sorted by row; by_position the same,
    sorted by position; groups (g, FIELDS), all int64; tables (t,) int16, F of every group's permutation without its
    upper bits, which are 0 for so few points. Each row reads six of them, and a GPU's cache holds twice as many as of
    int32. (PyTorch has uint16, and cannot save it.)
    """

    by_row: Tensor
    by_position: Tensor
    groups: Tensor
    tables: Tensor

    @classmethod
    def of(cls, groups: Sequence[Group], seed: int) -> Deal:
        """Deal the rows of `groups` out, the k-th group to the next groups[k].columns columns."""
        pieces = [piece for group in groups for piece in group.rows]
        sizes = [piece.stop - piece.start for piece in pieces]
        starts = list(accumulate(sizes, initial=0))[:-1]
        by_position = torch.tensor([[piece.start, q] for piece, q in zip(pieces, starts, strict=True)])
        by_row = by_position[by_position[:, 0].argsort()]
        tables, lengths = tables_of_all([group.size for group in groups], seed, [group.stream for group in groups])
        fields, position, column, taken = [], 0, 0, 0
        for group, length in zip(groups, lengths, strict=True):
            a, b = grid(group.size)
            grids = [b, taken, a, *_divisor(b), *_divisor(group.columns)]
            fields.append([position, group.size, group.columns, column, *grids])
            position, column, taken = position + group.size, column + group.columns, taken + length
        return cls(by_row, by_position, torch.tensor(fields), tables.short())

    def counts(self) -> Tensor:
        """(d,) int64: how many rows each column has."""
        _, n, d, first, *_ = self.groups.unbind(1)
        group = torch.repeat_interleave(d)
        return (n // d)[group] + (torch.arange(len(group)) - first[group] < (n % d)[group])

    def index(self) -> Tensor:
        """(D,) int32: the column of every row."""
        found = torch.empty(int(self.groups[:, 1].sum()), dtype=torch.int32)
        ends = [*self.by_position[1:, 1].tolist(), len(found)]
        groups = self.groups[self._group_of(self.by_position[:, 1])].tolist()
        for (row, position), end, (first, n, d, column, _, start, a, *_) in zip(
            self.by_position.tolist(), ends, groups, strict=True
        ):
            mine = found[row : row + end - position]
            tables = self._tables(start, a)
            run(_columns_from, found.device, position - first, n, d, column, tables, mine)
        return found

    def columns(self, rows: Tensor) -> Tensor:
        """(m,) int32: the columns of any rows (m,) int64, at the cost of these rows only."""
        piece = self.by_row[torch.searchsorted(self.by_row[:, 0].contiguous(), rows, right=True) - 1]
        position = rows - piece[:, 0] + piece[:, 1]
        group = self._group_of(position)
        found = torch.empty(len(rows), dtype=torch.int32)
        for g in group.unique().tolist():
            first, n, d, column, _, start, a, *_ = self.groups[g].tolist()
            here = group == g
            tables = self._tables(start, a)
            found[here] = column + evaluate((position[here] - first).int(), n, tables) % d
        return found

    def _tables(self, start: int, a: int) -> Tensor:
        """F of one group's permutation, int32."""
        return self.tables[start : start + ROUNDS * a].int() & 0xFFFF

    def _group_of(self, position: Tensor) -> Tensor:
        return torch.searchsorted(self.groups[:, 0].contiguous(), position.contiguous(), right=True) - 1


def _divisor(n: int) -> tuple[int, int]:
    """(m, s) with x // n = (2 x m >> 32) >> s for every x in [0, 2^31): the multiplication that stands for a division.

    s = ceil(log2 n) and m = ceil(2^(31 + s) / n) < 2^32 (Granlund and Montgomery 1994, "Division by invariant integers
    using multiplication", theorem 4.2).
    """
    s = (n - 1).bit_length()
    return -(-(1 << (31 + s)) // n), s


def _columns_from(first: int, n: int, columns: int, first_column: int, tables: Tensor, out: Tensor) -> None:
    """out[k] = first_column + pi(first + k) mod columns, pi the permutation of [0, n) of these tables."""

    def piece(part: slice) -> None:
        places = torch.arange(first + part.start, first + part.stop, dtype=torch.int32)
        out[part] = evaluate(places, n, tables).remainder_(columns).add_(first_column)

    in_parallel(piece, cut(len(out), _CHUNK))
