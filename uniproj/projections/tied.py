"""Shared factors with a scaler per module: VeRA and Tied-LoRA.

B^l = diag(v^l) B_g[:out], A^l = diag(u^l) A_g[:, :in]; module l belongs to group g.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from uniproj.budget import Budget, nearest
from uniproj.errors import ProjectionError
from uniproj.kernels.random import uniform
from uniproj.layout import LoRALayout
from uniproj.projection import Entries, Projection
from uniproj.registry import register


class _Side:
    """One factor (B with v, or A with u) of every module: what is trained of it and where it sits in theta_d."""

    def __init__(self, layout: LoRALayout, factor: str, groups: list[int], matrix: bool, scaler: bool, start: int):
        self.blocks = [b for b in layout.blocks if b.factor == factor]
        self.groups, self.matrix, self.scaler = groups, matrix, scaler
        self.sizes = {g: self._largest(g) for g in dict.fromkeys(groups)}
        self.scaler_sizes = [b.shape[0] for b in self.blocks]
        self.start = start
        self.numbers = sum(h * w for h, w in self.sizes.values()) if matrix else sum(self.scaler_sizes) if scaler else 0

    def _largest(self, group: int) -> tuple[int, int]:
        shapes = [b.shape for b, g in zip(self.blocks, self.groups, strict=True) if g == group]
        return max(s[0] for s in shapes), max(s[1] for s in shapes)

    def matrices(self, flat: Tensor) -> dict[int, Tensor]:
        """(n, numbers of all groups) -> one (n, rows, columns) view per group."""
        parts = flat.split([h * w for h, w in self.sizes.values()], dim=1)
        return {g: p.unflatten(1, self.sizes[g]) for g, p in zip(self.sizes, parts, strict=True)}


class SharedFactors(Projection):
    """See the module's docstring. `trained` is a subset of the letters u, v, A, B.

    The numbers of a side that are trained form theta_d: the shared matrix if trained, else the scalers. A side
    whose matrix *and* scaler are trained is bilinear: the matrix is in theta_d, the scaler a Parameter of P.
    A side with nothing trained is part of c. Modules of unequal shape use slices of the largest one.
    """

    needs_modules = True
    free_d = False
    sparse = True

    def __init__(self, layout: LoRALayout, seed: int, trained: str, groups: list[int]):
        letters = set(trained)
        if not letters or not letters <= set("uvAB"):
            raise ProjectionError(f"{self.name}: trained must be a non-empty subset of 'uvAB', got {trained!r}.")
        layout.pairs()
        ranks = {a.shape[0] for _, a in layout.pairs()}
        if len(ranks) > 1:
            raise ProjectionError(
                f"{self.name}: modules that share factors need one rank, got {sorted(ranks)}. Drop rank_pattern."
            )
        B = _Side(layout, "B", groups, "B" in letters, "v" in letters, 0)
        A = _Side(layout, "A", groups, "A" in letters, "u" in letters, B.numbers)
        super().__init__(layout, B.numbers + A.numbers, seed)
        self.sides = (B, A)
        self.trained_letters = "".join(sorted(letters))
        self.learned = any(side.matrix and side.scaler for side in self.sides)
        for side, letter, matrix in zip(self.sides, "vu", self._draw(), strict=True):
            scalers = torch.full((sum(side.scaler_sizes),), self._scaler_init(letter), dtype=torch.float64)
            if side.matrix and side.scaler:
                setattr(self, letter, nn.Parameter(scalers.float()))
            else:
                self.register_buffer(letter, scalers, persistent=False)
            self.register_buffer("B" if letter == "v" else "A", matrix, persistent=False)

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
            parts = []
            for g, (h, w) in side.sizes.items():
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

    def _scalers(self, side: _Side) -> Tensor:
        return getattr(self, "v" if side is self.sides[0] else "u")

    def _matrices(self, side: _Side) -> Tensor:
        return getattr(self, "B" if side is self.sides[0] else "A")

    def _fixed(self, side: _Side, like: Tensor) -> tuple[dict[int, Tensor], list[Tensor]]:
        """The matrices (1, h, w) by group and the scalers (1, rows, 1) by module that P itself holds."""
        matrices = side.matrices(self._matrices(side).to(like.dtype).unsqueeze(0))
        scalers = [s.view(1, -1, 1) for s in self._scalers(side).to(like.dtype).split(side.scaler_sizes)]
        return matrices, scalers

    def _factors(self, side: _Side, theta: Tensor) -> list[Tensor]:
        """Every module's factor of one side, (n, rows, columns), as a function of this side's theta (n, numbers)."""
        matrices, scalers = self._fixed(side, theta)
        if side.matrix:
            matrices = side.matrices(theta)
        elif side.scaler:
            scalers = [s.unsqueeze(2) for s in theta.split(side.scaler_sizes, dim=1)]
        return [
            s * matrices[g][:, : b.shape[0], : b.shape[1]]
            for b, g, s in zip(side.blocks, side.groups, scalers, strict=True)
        ]

    def _interleave(self, B: list[Tensor], A: list[Tensor]) -> Tensor:
        return torch.cat([x.flatten(1) for pair in zip(B, A, strict=True) for x in pair], dim=1)

    def _matvec(self, theta_d: Tensor) -> Tensor:
        n = len(theta_d)
        columns = []
        for side in self.sides:
            theta = theta_d[:, side.start : side.start + side.numbers]
            zeros = [theta_d.new_zeros(n, *b.shape) for b in side.blocks]
            columns.append(self._factors(side, theta) if side.numbers else zeros)
        return self._interleave(*columns)

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        factors = self.layout.split(theta_D)
        return torch.cat([self._pull(side, factors[i::2]) for i, side in enumerate(self.sides) if side.numbers], dim=1)

    def _pull(self, side: _Side, grads: list[Tensor]) -> Tensor:
        matrices, scalers = self._fixed(side, grads[0])
        if not side.matrix:
            return torch.cat(
                [
                    (x * matrices[g][:, : b.shape[0], : b.shape[1]]).sum(2)
                    for b, g, x in zip(side.blocks, side.groups, grads, strict=True)
                ],
                dim=1,
            )
        sums = {g: grads[0].new_zeros(len(grads[0]), h, w) for g, (h, w) in side.sizes.items()}
        for b, g, s, x in zip(side.blocks, side.groups, scalers, grads, strict=True):
            h, w = sums[g].shape[1:]
            sums[g] = sums[g] + nn.functional.pad(s * x, (0, w - b.shape[1], 0, h - b.shape[0]))
        return torch.cat([total.flatten(1) for total in sums.values()], dim=1)

    @property
    def offset(self) -> Tensor | None:
        if all(side.numbers for side in self.sides):
            return None
        like = self._matrices(self.sides[0])
        empty = like.new_zeros(1, 0)
        zeros = [[like.new_zeros(1, *b.shape) for b in side.blocks] for side in self.sides]
        fixed = [z if s.numbers else self._factors(s, empty) for s, z in zip(self.sides, zeros, strict=True)]
        return self._interleave(*fixed).squeeze(0)

    def entries(self) -> Entries:
        parts = [self._entries_of(side) for side in self.sides if side.numbers]
        rows, columns, values = (torch.cat(column) for column in zip(*parts, strict=True))
        return rows, columns, values

    def _entries_of(self, side: _Side) -> Entries:
        rows, columns, values = [], [], []
        starts, first = {}, side.start
        for g, (h, w) in side.sizes.items():
            starts[g], first = first, first + h * w
        seen = side.start
        matrices = side.matrices(self._matrices(side).detach().double().unsqueeze(0))
        for b, g, s in zip(side.blocks, side.groups, self._scalers(side).split(side.scaler_sizes), strict=True):
            i, j = torch.meshgrid(torch.arange(b.shape[0]), torch.arange(b.shape[1]), indexing="ij")
            rows.append((b.offset + i * b.shape[1] + j).flatten())
            if side.matrix:
                columns.append((starts[g] + i * side.sizes[g][1] + j).flatten())
                values.append(s.detach().double().unsqueeze(1).expand(b.shape).flatten())
            else:
                columns.append((seen + i).flatten())
                values.append(matrices[g][0, : b.shape[0], : b.shape[1]].flatten())
            seen += b.shape[0]
        device = self._matrices(side).device
        return torch.cat(rows).to(device), torch.cat(columns).to(device), torch.cat(values).to(device)


@register("vera")
class VeRA(SharedFactors):
    r"""Frozen random A, B shared by all modules; the scalers lambda_b (v) and lambda_d (u) are trained.

    Maths:  B^l = diag(lambda_b^l) B_hat[:out], A^l = diag(lambda_d^l) A_hat[:, :in]; kaiming-uniform draws,
            A_hat ~ U(+-sqrt(6 / in_max)), B_hat ~ U(+-sqrt(6 / r)). Starts at lambda_b = 0, lambda_d = 0.1.
    Claims: orthogonal, not isometric: E P^T P = 2 I, badly conditioned at small r.
    Source: Kopiczko et al. 2023, VeRA, arXiv 2310.11454, section 3; PEFT's VERA.
    """

    formula = "B = diag(lambda_b) B_hat, A = diag(lambda_d) A_hat"
    d_formula = "sum(out + r)"
    source = "arXiv 2310.11454"
    claims = frozenset({"linear", "orthogonal", "local"})

    def __init__(self, layout: LoRALayout, seed: int = 0, d_initial: float = 0.1):
        if d_initial == 0.0:
            raise ProjectionError(f"{self.name}: d_initial must not be 0: with lambda_b = 0 too no gradient is left.")
        self.d_initial = d_initial  # read by the draw inside super().__init__
        super().__init__(layout, seed, "uv", [0] * len(layout.modules))

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


def _group_of(modules: tuple[str, ...], group: str, who: str) -> list[int]:
    if group not in ("type", "all"):
        raise ProjectionError(f"{who}: group must be 'type' or 'all', got {group!r}.")
    keys = [m.rsplit(".", 1)[-1] if group == "type" else "" for m in modules]
    order = list(dict.fromkeys(keys))
    return [order.index(key) for key in keys]
