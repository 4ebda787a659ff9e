"""Projections made of projections: E_S, P1 P2, [P1 P2], diag(P1, P2), rows of P, alpha P.

A method that is written as one of them is rebuilt from layout, d and seed, as every method is: `rebuild =
Projection.rebuild`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from uniproj.errors import ProjectionError
from uniproj.layout import LoRALayout
from uniproj.projection import Entries, Projection


class Select(Projection):
    """E_S: coordinate j of theta_d is row S[j] of theta_D; all other rows are 0. P^T P = I."""

    name = "select"
    sparse = True
    claims = frozenset({"linear", "orthogonal", "isometric", "uniform", "local"})

    def __init__(self, layout: LoRALayout, rows: Tensor, seed: int = 0):
        super().__init__(layout, len(rows), seed)
        ascends = bool((rows[1:] > rows[:-1]).all())
        distinct = ascends or rows.unique().numel() == len(rows)
        if not distinct or not 0 <= int(rows.min()) <= int(rows.max()) < layout.D:
            raise ProjectionError(f"select: rows must be distinct and lie in [0, {layout.D}).")
        self.rows = rows.long()
        self.order = None if ascends else self.rows.argsort()

    def rebuild(self, **changes: Any) -> Projection:
        return Select(**{"layout": self.layout, "rows": self.rows.cpu(), "seed": self.seed, **changes})

    def _matvec(self, theta_d: Tensor) -> Tensor:
        return theta_d.new_zeros(theta_d.shape[0], self.D).index_copy(1, self.rows, theta_d)

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        return theta_D.index_select(1, self.rows)

    def columns(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(m,) int64: the columns of these rows, and whether a row has any; the others' are arbitrary."""
        place = torch.searchsorted(self.rows, rows, sorter=self.order).clamp_(max=self.d - 1)
        columns = place if self.order is None else self.order[place]
        return columns, self.rows[columns] == rows

    def at_rows(self, theta_d: Tensor, rows: Tensor) -> Tensor:
        columns, some = self.columns(rows.to(self.rows.device))
        found = torch.where(some, theta_d[columns], 0.0)
        return found if self.offset is None else found + self.offset.to(found.dtype)[rows]

    def entries(self) -> Entries:
        ones = torch.ones(self.d, dtype=torch.float64, device=self.rows.device)
        return self.rows, torch.arange(self.d, device=self.rows.device), ones


class _Composite(Projection):
    """Shared by the combinators: learned or sparse as their parts are, dense form by their own definition.

    `seed` counts from the seeds with which the parts were given, and is 0 there: `rebuild(seed=s)` adds s - `seed` to
    the seed of every part, so that parts that were drawn apart stay apart.
    """

    claims = frozenset()
    claims_if = {
        "linear": ("no part has a c", lambda P: P.offset is None),
        "affine": ("a part has a c", lambda P: P.offset is not None),
    }

    def __init__(self, layout: LoRALayout, d: int, parts: Sequence[Projection]):
        super().__init__(layout, d)
        self.parts = nn.ModuleList(parts)
        self.learned = any(p.learned for p in parts)
        self.sparse = all(p.sparse for p in parts)
        self.sums_products = self.sums_products or any(p.sums_products for p in parts)

    def _children(self) -> list[Projection]:
        return list(self.parts)  # type: ignore[arg-type]

    def rebuild(self, **changes: Any) -> Projection:
        """Of rebuilt parts. Raises ProjectionError for changes of anything but the seed."""
        seed = changes.pop("seed", self.seed)
        if changes:
            raise ProjectionError(
                f"{self.name}: rebuild of a composite takes seed= alone, got {sorted(changes)}. Rebuild its parts."
            )
        fresh = self._of([p.rebuild(seed=(p.seed + seed - self.seed) % 2**64) for p in self._children()])
        fresh.seed = seed
        return fresh

    @abstractmethod
    def _of(self, parts: list[Projection]) -> Projection:
        """The same of other parts."""

    def init_theta(self, seed: int = 0) -> Tensor:
        return torch.cat([p.init_theta(seed) for p in self._children()])

    def to_dense(self) -> Tensor:
        return self._combine([p.to_dense() for p in self._children()])

    def entries(self) -> Entries:
        if not self.sparse:
            return super().entries()
        P = self._combine([p.to_sparse().to_sparse_coo() for p in self._children()]).to_sparse_coo().coalesce()
        rows, columns = P.indices()
        return rows, columns, P.values()

    @abstractmethod
    def _combine(self, matrices: list[Tensor]) -> Tensor:
        """The written matrix from the parts' written matrices, all dense or all sparse."""


class Compose(_Composite):
    """P1 P2 theta_d + (P1 c2 + c1): first `inner`, then `outer`. Needs outer.d == inner.D."""

    name = "compose"
    sums_products = True

    def __init__(self, outer: Projection, inner: Projection):
        if outer.d != inner.D:
            raise ProjectionError(f"compose: outer.d must equal inner.D, got {outer.d} and {inner.D}.")
        super().__init__(outer.layout, inner.d, [outer, inner])

    def _of(self, parts: list[Projection]) -> Projection:
        return Compose(*parts)

    def _matvec(self, theta_d: Tensor) -> Tensor:
        outer, inner = self._children()
        return outer._matvec(inner._matvec(theta_d))

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        outer, inner = self._children()
        return inner._rmatvec(outer._rmatvec(theta_D))

    def at_rows(self, theta_d: Tensor, rows: Tensor) -> Tensor:
        outer, inner = self._children()
        if not isinstance(outer, Select) or outer.offset is not None:
            return super().at_rows(theta_d, rows)
        columns, some = outer.columns(rows.to(outer.rows.device))
        return torch.where(some, inner.at_rows(theta_d, columns), 0.0)

    @property
    def offset(self) -> Tensor | None:
        outer, inner = self._children()
        moved = None if inner.offset is None else outer.matvec(inner.offset)
        return _sum([moved, outer.offset])

    def init_theta(self, seed: int = 0) -> Tensor:
        return self._children()[1].init_theta(seed)

    def _combine(self, matrices: list[Tensor]) -> Tensor:
        return matrices[0] @ matrices[1]


class ConcatColumns(_Composite):
    """[P1 P2 ..]: theta_D is the sum of P_i theta_i (+ c_i), with theta_d = (theta_1, theta_2, ..)."""

    name = "concat_columns"

    def __init__(self, parts: Sequence[Projection]):
        if len({p.D for p in parts}) != 1:
            raise ProjectionError(f"concat_columns: the parts must share D, got {[p.D for p in parts]}.")
        super().__init__(parts[0].layout, sum(p.d for p in parts), parts)

    def _of(self, parts: list[Projection]) -> Projection:
        return ConcatColumns(parts)

    def _matvec(self, theta_d: Tensor) -> Tensor:
        thetas = _cut(theta_d, [p.d for p in self._children()])
        terms = [p._matvec(t) for p, t in zip(self._children(), thetas, strict=True)]
        return torch.stack(terms).sum(0)

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        return torch.cat([p._rmatvec(theta_D) for p in self._children()], dim=1)

    def at_rows(self, theta_d: Tensor, rows: Tensor) -> Tensor:
        thetas = theta_d.split([p.d for p in self._children()])
        return torch.stack([p.at_rows(t, rows) for p, t in zip(self._children(), thetas, strict=True)]).sum(0)

    @property
    def offset(self) -> Tensor | None:
        return _sum([p.offset for p in self._children()])

    def _combine(self, matrices: list[Tensor]) -> Tensor:
        return torch.cat(matrices, dim=1)


class BlockDiagonal(_Composite):
    """diag(P1, P2, ..): part i owns its own rows and its own columns.

    `layout` names the stacked rows (its D must be the sum of the parts'); flat by default.
    """

    name = "block_diagonal"

    def __init__(self, parts: Sequence[Projection], layout: LoRALayout | None = None):
        D = sum(p.D for p in parts)
        layout = layout or LoRALayout.flat(D)
        if layout.D != D:
            raise ProjectionError(f"block_diagonal: the parts have {D} rows together, the layout has {layout.D}.")
        super().__init__(layout, sum(p.d for p in parts), parts)

    def _of(self, parts: list[Projection]) -> Projection:
        return BlockDiagonal(parts, self.layout)

    def _matvec(self, theta_d: Tensor) -> Tensor:
        thetas = _cut(theta_d, [p.d for p in self._children()])
        return torch.cat([p._matvec(t) for p, t in zip(self._children(), thetas, strict=True)], dim=1)

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        pieces = _cut(theta_D, [p.D for p in self._children()])
        return torch.cat([p._rmatvec(x) for p, x in zip(self._children(), pieces, strict=True)], dim=1)

    @property
    def offset(self) -> Tensor | None:
        offsets = [(p, p.offset) for p in self._children()]
        given = [c for _, c in offsets if c is not None]
        if not given:
            return None
        return torch.cat([given[0].new_zeros(p.D) if c is None else c for p, c in offsets])

    def _combine(self, matrices: list[Tensor]) -> Tensor:
        if all(m.is_sparse for m in matrices):
            return _sparse_block_diagonal(matrices)
        return torch.block_diag(*matrices)


class Restrict(_Composite):
    """The rows of P that belong to some of its modules: what one layer sees of theta_d."""

    name = "restrict"

    def __init__(self, projection: Projection, modules: Iterable[str]):
        modules = list(modules)
        rows = projection.layout.rows(modules)
        super().__init__(projection.layout.restrict(modules), projection.d, [projection])
        self.rows = rows

    @classmethod
    def check_d(cls, layout: LoRALayout, d: int) -> None:
        """Nothing: d is the whole projection's, and may exceed the rows that are left."""

    def _of(self, parts: list[Projection]) -> Projection:
        return Restrict(parts[0], self.layout.modules)

    def _matvec(self, theta_d: Tensor) -> Tensor:
        return self._children()[0]._matvec(theta_d).index_select(1, self.rows)

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        whole = theta_D.new_zeros(theta_D.shape[0], self._children()[0].D)
        return self._children()[0]._rmatvec(whole.index_copy(1, self.rows, theta_D))

    @property
    def offset(self) -> Tensor | None:
        c = self._children()[0].offset
        return None if c is None else c[self.rows]

    def _combine(self, matrices: list[Tensor]) -> Tensor:
        return matrices[0].index_select(0, self.rows)


class Scale(_Composite):
    """alpha P theta_d + alpha c."""

    name = "scale"

    def __init__(self, projection: Projection, alpha: float):
        super().__init__(projection.layout, projection.d, [projection])
        self.alpha = alpha

    def _of(self, parts: list[Projection]) -> Projection:
        return Scale(parts[0], self.alpha)

    def _matvec(self, theta_d: Tensor) -> Tensor:
        return self.alpha * self._children()[0]._matvec(theta_d)

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        return self.alpha * self._children()[0]._rmatvec(theta_D)

    @property
    def offset(self) -> Tensor | None:
        c = self._children()[0].offset
        return None if c is None else self.alpha * c

    def _combine(self, matrices: list[Tensor]) -> Tensor:
        return matrices[0] * self.alpha


def _cut(x: Tensor, sizes: list[int]) -> list[Tensor]:
    """(n, sum of sizes) -> (n, size) of each part."""
    return [part.contiguous() for part in x.split(sizes, dim=1)]


def _sum(terms: Sequence[Tensor | None]) -> Tensor | None:
    present = [t for t in terms if t is not None]
    return torch.stack(present).sum(0) if present else None


def _sparse_block_diagonal(matrices: list[Tensor]) -> Tensor:
    indices, values, corner = [], [], torch.zeros(2, 1, dtype=torch.long)
    for m in (m.coalesce() for m in matrices):
        indices.append(m.indices() + corner.to(m.device))
        values.append(m.values())
        corner = corner + torch.tensor(m.shape).view(2, 1)
    return torch.sparse_coo_tensor(
        torch.cat(indices, 1), torch.cat(values), tuple(corner.flatten().tolist()), check_invariants=False
    )
