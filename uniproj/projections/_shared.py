"""Factors that modules share, with scalers of their own.

B^l = diag(v^l) B_g[:out], A^l = diag(u^l) A_g[:, :in]; module l belongs to group g.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from uniproj.errors import ProjectionError
from uniproj.kernels.random import uniform
from uniproj.kernels.shared import block_table, matrix_gradient, product, scale_gradient
from uniproj.layout import Block, LoRALayout
from uniproj.projection import Entries, Projection


class _Side:
    """One factor of every module, B with scalers v or A with scalers u, and what is trained of it."""

    def __init__(self, layout: LoRALayout, factor: str, groups: list[int], trained_letters: set[str]):
        self.factor, self.letter = factor, "v" if factor == "B" else "u"
        self.blocks = [b for b in layout.blocks if b.factor == factor]
        self.matrix, self.scaler = factor in trained_letters, self.letter in trained_letters
        _, (matrix_numbers, scalers, *_), self.sizes = block_table(_corners(self.blocks), groups)
        self.matrix_numbers = matrix_numbers
        self.scaler_sizes = [b.shape[0] for b in self.blocks]
        self.numbers = matrix_numbers if self.matrix else scalers if self.scaler else 0


class SharedFactors(Projection):
    """See the module's docstring. `trained` is a subset of the letters u, v, A, B.

    The numbers of a side that are trained form theta_d: the shared matrix if trained, else the scalers. A side
    whose matrix *and* scaler are trained is bilinear: the matrix is in theta_d, the scaler a Parameter of P.
    A side with nothing trained is part of c. Modules of unequal shape use slices of the largest one.
    """

    needs_modules = True
    free_d = False
    sparse = True
    table: Tensor
    A: Tensor
    B: Tensor

    def __init__(self, layout: LoRALayout, seed: int, trained: str, groups: list[int], u: float = 1.0):
        letters = set(trained)
        if not letters or not letters <= set("uvAB"):
            raise ProjectionError(f"{self.name}: trained must be a non-empty subset of 'uvAB', got {trained!r}.")
        ranks = {a.shape[0] for _, a in layout.pairs()}
        if len(ranks) > 1:
            raise ProjectionError(
                f"{self.name}: modules that share factors need one rank, got {sorted(ranks)}. Drop rank_pattern, and "
                "give a convolution of g groups, which parts its rank among them, g times the rank of the others."
            )
        B, A = (_Side(layout, factor, groups, letters) for factor in "BA")
        super().__init__(layout, B.numbers + A.numbers, seed)
        self.sides, self.groups = (B, A), groups
        self.trained_letters = "".join(sorted(letters))
        self.learned = any(side.matrix and side.scaler for side in self.sides)
        for side, matrix, start in zip(self.sides, self._draw(), (1.0, u), strict=True):
            scalers = torch.full((sum(side.scaler_sizes),), start, dtype=torch.float64)
            if side.matrix and side.scaler:
                setattr(self, side.letter, nn.Parameter(scalers.float()))
            else:
                setattr(self, side.letter, scalers)
            setattr(self, side.factor, matrix)
        both = [*groups, *(len(B.sizes) + group for group in groups)]
        table, extents, _ = block_table(_corners([*B.blocks, *A.blocks]), both)
        self.table = table
        self.extents = [layout.D, *extents]

    # ---- the start --------------------------------------------------------------------------------

    def _zero(self) -> str:
        """The one ingredient that starts at 0, so that delta W = 0 and its gradient is not."""
        return next(letter for letter in "BvAu" if letter in self.trained_letters)

    @abstractmethod
    def _bounds(self, width: int) -> float:
        """Bound of the uniform draw of A for in = width."""

    def _draw(self) -> tuple[Tensor, Tensor]:
        """Flat shared matrices (B, A) of all groups, float64: kaiming uniform."""
        flat: list[Tensor] = []
        for side, name in zip(self.sides, "BA", strict=True):
            parts: list[Tensor] = []
            for g, (h, w) in enumerate(side.sizes):
                bound = (6.0 / w) ** 0.5 if name == "B" else self._bounds(w)
                parts.append(bound * uniform(self.seed, f"{self.name}.{name}", h * w, part=g))
            flat.append(torch.cat(parts))
        return flat[0], flat[1]

    def init_theta(self, seed: int = 0) -> Tensor:
        zero, parts = self._zero(), []
        for side, matrix, scaler in zip(self.sides, "BA", "vu", strict=True):
            letter = matrix if side.matrix else scaler
            start = getattr(self, letter).detach().cpu()
            parts.append((torch.zeros_like(start) if letter == zero else start)[: side.numbers])
        return torch.cat(parts).float()

    # ---- the map ----------------------------------------------------------------------------------

    def _slots(self, theta_d: Tensor) -> tuple[Tensor, Tensor]:
        """The matrices (B, A) and the scalers (v, u) of all modules, (n, numbers), with theta_d in its places.

        The scalers of a side with nothing trained are 0, as this side is c's.
        """
        matrices, scalers = [], []
        for side, theta in zip(self.sides, theta_d.split([s.numbers for s in self.sides], dim=1), strict=True):
            matrix, scaler = (getattr(self, name).to(theta.dtype) for name in (side.factor, side.letter))
            matrices.append(theta if side.matrix else matrix.expand(theta.shape[0], -1))
            scaler = scaler if side.numbers else torch.zeros_like(scaler)
            scalers.append(theta if side.scaler and not side.matrix else scaler.expand(theta.shape[0], -1))
        return torch.cat(matrices, dim=1), torch.cat(scalers, dim=1)

    def _matvec(self, theta_d: Tensor) -> Tensor:
        return product(*self._slots(theta_d), self.table, self.extents, theta_d.dtype)

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        # what theta_d would put into the slots multiplies nothing that is read below
        matrix, scale = self._slots(theta_D.new_zeros(theta_D.shape[0], self.d))
        of_sides: list[tuple[Tensor, ...]] = [(), ()]
        if any(side.matrix for side in self.sides):
            of_matrix = matrix_gradient(theta_D, scale, self.table, self.extents, theta_D.dtype)
            of_sides[0] = of_matrix.split([side.matrix_numbers for side in self.sides], dim=1)
        if any(side.scaler and not side.matrix for side in self.sides):
            of_scale = scale_gradient(theta_D, matrix, self.table, self.extents, theta_D.dtype)
            of_sides[1] = of_scale.split([sum(side.scaler_sizes) for side in self.sides], dim=1)
        return torch.cat([of_sides[int(not s.matrix)][k] for k, s in enumerate(self.sides) if s.numbers], dim=1)

    @property
    def offset(self) -> Tensor | None:
        if all(side.numbers for side in self.sides):
            return None
        # the sides in theta_d leave c at 0: their scalers are 0 here
        dtype = self.B.dtype  # float64, where the device has it
        scalers = [getattr(self, s.letter).detach().to(dtype) * float(s.numbers == 0) for s in self.sides]
        matrix, scale = torch.cat([self.B, self.A]).unsqueeze(0), torch.cat(scalers).unsqueeze(0)
        return product(matrix, scale, self.table, self.extents, dtype).squeeze(0)

    def entries(self) -> Entries:
        parts: list[Entries] = []
        first = 0
        for side in self.sides:
            if side.numbers:
                parts.extend(self._entries_of(side, first))
            first += side.numbers
        rows, columns, values = (torch.cat(column).to(self.device) for column in zip(*parts, strict=True))
        return rows, columns, values

    def _entries_of(self, side: _Side, first: int) -> Iterator[Entries]:
        """Block by block; `first` is the column of the side's first number."""
        matrices = getattr(self, side.factor).double().cpu().split([h * w for h, w in side.sizes])
        scalers = getattr(self, side.letter).detach().double().cpu().split(side.scaler_sizes)
        for k, (block, group) in enumerate(zip(side.blocks, self.groups, strict=True)):
            i, j = torch.meshgrid(torch.arange(block.shape[0]), torch.arange(block.shape[1]), indexing="ij")
            within = i * side.sizes[group][1] + j
            if side.matrix:
                columns = first + sum(h * w for h, w in side.sizes[:group]) + within
                values = scalers[k][i]
            else:
                columns = first + sum(side.scaler_sizes[:k]) + i
                values = matrices[group][within]
            yield (block.offset + i * block.shape[1] + j).flatten(), columns.flatten(), values.flatten()


def _corners(blocks: Sequence[Block]) -> list[tuple[int, int, int]]:
    """(offset in theta_D, rows, columns) of every block."""
    return [(b.offset, *b.shape) for b in blocks]
