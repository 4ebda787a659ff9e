"""Shared factors with a scaler per module: VeRA and Tied-LoRA.

B^l = diag(v^l) B_g[:out], A^l = diag(u^l) A_g[:, :in]; module l belongs to group g.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from uniproj.budget import Budget, nearest
from uniproj.errors import ProjectionError
from uniproj.kernels.random import uniform
from uniproj.kernels.shared import block_table, matrix_gradient, product, scale_gradient
from uniproj.layout import Block, LoRALayout
from uniproj.projection import Entries, Projection
from uniproj.registry import register


class _Side:
    """One factor of every module, B with scalers v or A with scalers u, and what is trained of it."""

    def __init__(self, layout: LoRALayout, factor: str, groups: list[int], trained: set[str]):
        self.factor, self.letter = factor, "v" if factor == "B" else "u"
        self.blocks = [b for b in layout.blocks if b.factor == factor]
        self.matrix, self.scaler = factor in trained, self.letter in trained
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

    def __init__(self, layout: LoRALayout, seed: int, trained: str, groups: list[int]):
        letters = set(trained)
        if not letters or not letters <= set("uvAB"):
            raise ProjectionError(f"{self.name}: trained must be a non-empty subset of 'uvAB', got {trained!r}.")
        ranks = {a.shape[0] for _, a in layout.pairs()}
        if len(ranks) > 1:
            raise ProjectionError(
                f"{self.name}: modules that share factors need one rank, got {sorted(ranks)}. Drop rank_pattern."
            )
        B, A = (_Side(layout, factor, groups, letters) for factor in "BA")
        super().__init__(layout, B.numbers + A.numbers, seed)
        self.sides, self.groups = (B, A), groups
        self.trained_letters = "".join(sorted(letters))
        self.learned = any(side.matrix and side.scaler for side in self.sides)
        for side, matrix in zip(self.sides, self._draw(), strict=True):
            scalers = torch.full((sum(side.scaler_sizes),), self._scaler_init(side.letter), dtype=torch.float64)
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

    def _scaler_init(self, letter: str) -> float:
        return 1.0

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
        scalers = [getattr(self, s.letter).detach().double() * float(s.numbers == 0) for s in self.sides]
        matrix, scale = torch.cat([self.B, self.A]).unsqueeze(0), torch.cat(scalers).unsqueeze(0)
        return product(matrix, scale, self.table, self.extents, torch.float64).squeeze(0)

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


@register("vera")
class VeRA(SharedFactors):
    r"""Frozen random A, B shared by all modules; the scalers lambda_b (v) and lambda_d (u) are trained.

    Maths:  B^l = diag(lambda_b^l) B_hat[:out], A^l = diag(lambda_d^l) A_hat[:, :in]; kaiming-uniform draws,
            A_hat ~ U(+-sqrt(6 / in_max)), B_hat ~ U(+-sqrt(6 / r)). Starts at lambda_b = 0, lambda_d = 0.1.
    Draw:   "philox" as everywhere here, or "peft": the matrices of PEFT's VERA for projection_prng_key = seed.
    Claims: orthogonal, not isometric: E P^T P = 2 I, badly conditioned at small r.
    Source: Kopiczko et al. 2023, VeRA, arXiv 2310.11454, section 3; PEFT's VERA.
    """

    formula = "B = diag(lambda_b) B_hat, A = diag(lambda_d) A_hat"
    d_formula = "sum(out + r)"
    source = "arXiv 2310.11454"
    claims = frozenset({"linear", "orthogonal", "local"})
    variants = ({}, {"draw": "peft"})

    def __init__(self, layout: LoRALayout, seed: int = 0, d_initial: float = 0.1, draw: str = "philox"):
        if d_initial == 0.0:
            raise ProjectionError(f"{self.name}: d_initial must not be 0: with lambda_b = 0 too no gradient is left.")
        if draw not in ("philox", "peft"):
            raise ProjectionError(f"{self.name}: draw must be 'philox' or 'peft', got {draw!r}.")
        self.d_initial, self.draw = d_initial, draw  # read by the draw inside super().__init__
        super().__init__(layout, seed, "uv", [0] * len(layout.modules))

    def _draw(self) -> tuple[Tensor, Tensor]:
        if self.draw == "philox":
            return super()._draw()
        generator = torch.Generator().manual_seed(self.seed)
        flat = {}
        for side in reversed(self.sides):  # A before B, as PEFT does
            ((h, w),) = side.sizes
            bound = 3.0**0.5 * (2.0**0.5 / w**0.5)
            flat[side.factor] = torch.empty(h * w).uniform_(-bound, bound, generator=generator).double()
        return flat["B"], flat["A"]

    def _scaler_init(self, letter: str) -> float:
        return self.d_initial if letter == "u" else 1.0

    def _bounds(self, width: int) -> float:
        return (6.0 / width) ** 0.5

    @classmethod
    def for_budget(cls, shapes: Mapping[str, tuple[int, int]], budget: int, r: int) -> Budget:
        out = sum(out for out, _ in shapes.values())
        top = max(256, 1 + (budget - out) // len(shapes))
        return nearest(budget, range(1, top + 2), lambda r: out + r * len(shapes))


@register("tied_lora")
class TiedLoRA(SharedFactors):
    r"""A and B shared by the modules of a group; each of u, v, A, B is trained or frozen.

    Maths:  delta W^l = diag(v^l) B diag(u^l) A. trained="ABuv" is the paper's best configuration, "AB" plain tying,
            "uv" VeRA's choice; every non-empty subset is allowed. One group per type of module (the last part
            of its name, group="type"), or one for all (group="all").
    Start:  A ~ U(+-1/sqrt(in)), frozen B ~ U(+-sqrt(6/r)), u = v = 1, and the first trained of B, v, A, u is 0.
    Claims: with only A, B trained and u = v = 1, P^T P = M I for M modules of equal shape.
    Source: Renduchintala et al. 2023, Tied-LoRA, arXiv 2311.09578, section 3.
    """

    formula = "B = diag(v) B_shared, A = diag(u) A_shared"
    d_formula = "[B] r out + [A] r in per group, [v] sum(out), [u] M r"
    source = "arXiv 2311.09578"
    learned = True
    claims = frozenset({"orthogonal"})
    claims_if = {"linear": "B or v, and A or u, trained", "affine": "one of the factors wholly frozen"}
    variants = (
        {},
        {"trained": "AB"},
        {"trained": "ABu", "group": "all"},
        {"trained": "uv"},
        {"trained": "A"},
        {"trained": "Bv"},
    )

    @classmethod
    def parameter_shapes(cls, layout: LoRALayout, d: int, trained: str = "ABuv", **_: Any) -> dict[str, tuple[int]]:
        bilinear = {"v": "B", "u": "A"}
        numbers = {f: sum(b.shape[0] for b in layout.blocks if b.factor == f) for f in bilinear.values()}
        return {scaler: (numbers[f],) for scaler, f in bilinear.items() if {scaler, f} <= set(trained)}

    def __init__(self, layout: LoRALayout, seed: int = 0, trained: str = "ABuv", group: str = "type"):
        super().__init__(layout, seed, trained, _group_of(layout.modules, group, self.name))
        self.claims = self.claims | {"linear" if self.offset is None else "affine"}

    def _bounds(self, width: int) -> float:
        return width**-0.5

    @classmethod
    def for_budget(cls, shapes: Mapping[str, tuple[int, int]], budget: int, r: int) -> Budget:
        options = [{"trained": t, "group": g} for t in ("ABuv", "ABu", "AB") for g in ("type", "all")]

        def count(r: int, trained: str, group: str) -> int:
            layout = LoRALayout.from_shapes(shapes, r)
            groups = _group_of(layout.modules, group, cls.name)
            largest = {g: [0, 0] for g in groups}
            for (out, in_), g in zip((shapes[m] for m in layout.modules), groups, strict=True):
                largest[g] = [max(largest[g][0], out), max(largest[g][1], in_)]
            shared = r * sum(out * ("B" in trained) + in_ * ("A" in trained) for out, in_ in largest.values())
            scalers = sum(out for out, _ in shapes.values()) * ("v" in trained) + r * len(shapes) * ("u" in trained)
            return shared + scalers

        smallest = min(out + in_ for out, in_ in shapes.values())
        return nearest(budget, range(1, 2 + min(64, 1 + budget // smallest)), count, options)


def _corners(blocks: Sequence[Block]) -> list[tuple[int, int, int]]:
    """(offset in theta_D, rows, columns) of every block."""
    return [(b.offset, *b.shape) for b in blocks]


def _group_of(modules: tuple[str, ...], group: str, who: str) -> list[int]:
    if group not in ("type", "all"):
        raise ProjectionError(f"{who}: group must be 'type' or 'all', got {group!r}.")
    keys = [m.rsplit(".", 1)[-1] if group == "type" else "" for m in modules]
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return [number[key] for key in keys]
