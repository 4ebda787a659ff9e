"""A small matrix R between frozen singular factors of the base weight: LoRA-XS and TinyLoRA."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from uniproj.budget import Budget, nearest
from uniproj.errors import ProjectionError
from uniproj.kernels.random import normal
from uniproj.kernels.svd import truncated_svd
from uniproj.layout import LoRALayout
from uniproj.projection import Entries, Projection
from uniproj.registry import register


class SingularFactors(Projection):
    """delta W^l = B^l R^l A^l with frozen B^l (out, r), A^l (r, in) from the SVD of W^l, and R^l(theta_d) linear.

    R is absorbed by one side, the other is c: side="B" gives theta_D = [vec(B R); vec A], side="A"
    [vec B; vec(R A)]. delta W is the same; P, and whether it is isometric, is not.

    base_weights: W^l (out, in) by module name. Raises ProjectionError for a missing or misshaped weight,
    or a rank beyond min(out, in).
    """

    needs_modules = True
    needs_base_weights = True
    free_d = False
    power: tuple[float, float]  # exponents of the singular values in (B, A)

    def __init__(self, layout: LoRALayout, d: int, seed: int, base_weights: Mapping[str, Tensor], side: str):
        if side not in ("A", "B"):
            raise ProjectionError(f"{self.name}: side must be 'A' or 'B', got {side!r}.")
        # before the bounds of d, which may be a matter of r here
        for b, a in layout.pairs():
            if (r := a.shape[0]) > (most := min(b.shape[0], a.shape[1])):
                raise ProjectionError(
                    f"{self.name}: r must be at most min(out, in) = {most} of {b.module}, got {r}. Lower r."
                )
        super().__init__(layout, d, seed)
        self.side = side
        self.ranks = [a.shape[0] for _, a in layout.pairs()]
        factors: list[tuple[Tensor, Tensor]] = []
        for i, (b, a) in enumerate(layout.pairs()):
            wanted = (b.shape[0], a.shape[1])
            W = base_weights.get(b.module)
            if W is None or tuple(W.shape) != wanted:
                found = "none" if W is None else tuple(W.shape)
                raise ProjectionError(
                    f"{self.name}: {b.module} needs a base weight of shape {wanted}, got {found}. "
                    "Pass base_weights={name: (out, in) tensor}."
                )
            U, S, Vh = truncated_svd(W, self.ranks[i], seed)
            factors.append((U * S ** self.power[0], (S ** self.power[1]).unsqueeze(1) * Vh))
        # modules of one shape are multiplied at once
        alike: dict[Any, list[int]] = {}
        for i, (b, a) in enumerate(layout.pairs()):
            alike.setdefault((b.shape, a.shape), []).append(i)
        self.alike = list(alike.values())
        for g, members in enumerate(self.alike):
            for letter, stack in zip("BA", zip(*(factors[i] for i in members), strict=True), strict=True):
                setattr(self, f"{letter}_{g}", torch.stack(stack))

    @abstractmethod
    def _R(self, theta_d: Tensor) -> list[Tensor]:
        """(n, d) -> the (n, r, r) matrix of every module."""

    @abstractmethod
    def _R_adjoint(self, grads: list[Tensor]) -> Tensor:
        """The adjoint of `_R`: (n, r, r) per module -> (n, d)."""

    def _stacks(self, letter: str, dtype: torch.dtype) -> list[Tensor]:
        return [getattr(self, f"{letter}_{g}").to(dtype) for g in range(len(self.alike))]

    def frozen(self, letter: str) -> list[Tensor]:
        """The factor B^l (out, r) or A^l (r, in) of every module, float64; views of P's own numbers."""
        by_module = {
            i: x
            for members, stack in zip(self.alike, self._stacks(letter, torch.float64), strict=True)
            for i, x in zip(members, stack, strict=True)
        }
        return [by_module[i] for i in range(len(self.ranks))]

    def _place(self, stacks: list[Tensor], letter: str) -> Tensor:
        """theta_D (n, D) with these (n, modules alike, rows, columns) factors on one side and zeros on the other."""
        theta_D = stacks[0].new_zeros(stacks[0].shape[0], self.D)
        blocks = [pair["BA".index(letter)] for pair in self.layout.pairs()]
        for members, stack in zip(self.alike, stacks, strict=True):
            for i, x in zip(members, stack.flatten(2).unbind(1), strict=True):
                theta_D[:, blocks[i].rows] = x
        return theta_D

    def _matvec(self, theta_d: Tensor) -> Tensor:
        R, moved = self._R(theta_d), []
        for members, stack in zip(self.alike, self._stacks(self.side, theta_d.dtype), strict=True):
            ours = torch.stack([R[i] for i in members], dim=1)
            moved.append(stack @ ours if self.side == "B" else ours @ stack)
        return self._place(moved, self.side)

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        factors = self.layout.split(theta_D)[0 if self.side == "B" else 1 :: 2]
        grads: dict[int, Tensor] = {}
        for members, stack in zip(self.alike, self._stacks(self.side, theta_D.dtype), strict=True):
            ours = torch.stack([factors[i] for i in members], dim=1)
            of_R = stack.mT @ ours if self.side == "B" else ours @ stack.mT
            grads |= dict(zip(members, of_R.unbind(1), strict=True))
        return self._R_adjoint([grads[i] for i in range(len(self.ranks))])

    @property
    def offset(self) -> Tensor:
        other = "A" if self.side == "B" else "B"
        return self._place([stack.unsqueeze(0) for stack in self._stacks(other, torch.float64)], other).squeeze(0)

    def to_dense(self) -> Tensor:
        """Column j is theta_D of the j-th unit vector, written with Kronecker products: vec(B R) = (B kron I) vec R."""
        J = self._R_matrix()
        P = torch.zeros(self.shape, dtype=torch.float64, device=J.device)
        taken = 0
        for F, r, (b, a) in zip(self.frozen(self.side), self.ranks, self.layout.pairs(), strict=True):
            eye = torch.eye(r, dtype=torch.float64, device=J.device)
            block, lift = (
                (b, torch.kron(F.contiguous(), eye)) if self.side == "B" else (a, torch.kron(eye, F.T.contiguous()))
            )
            P[block.rows] = lift @ J[taken : taken + r * r]
            taken += r * r
        return P

    @abstractmethod
    def _R_matrix(self) -> Tensor:
        """(sum r^2, d) float64: the map from theta_d to the stacked vec(R^l)."""


@register("lora_xs")
class LoRAXS(SingularFactors):
    r"""R^l (r x r) is trained per module between B = U_r and A = diag(S_r) V_r^T.

    Start:  R ~ N(0, (1e-5)^2), so the model starts (almost) unchanged.
    Claims: isometric with R absorbed by B, whose columns are orthonormal; with side="A" the Gram matrix is weighted
            by squared singular values.
    Source: Balazy et al. 2024, LoRA-XS, arXiv 2405.17604, section 3.
    """

    formula = "theta_D = (vec(U_r R), vec(S_r V_r^T))"
    d_formula = "M r^2"
    source = "arXiv 2405.17604"
    claims = frozenset({"affine", "local"})
    claims_if = {"isometric": "side='B'", "orthogonal": "side='B'"}
    variants = ({}, {"side": "A"})
    sparse = True
    power = (0.0, 1.0)

    def __init__(self, layout: LoRALayout, base_weights: Mapping[str, Tensor], seed: int = 0, side: str = "B"):
        super().__init__(layout, sum(a.shape[0] ** 2 for _, a in layout.pairs()), seed, base_weights, side)
        if side == "B":
            self.claims = self.claims | {"isometric", "orthogonal"}

    @classmethod
    def for_budget(cls, shapes: Mapping[str, tuple[int, int]], budget: int, r: int) -> Budget:
        top = min(min(shape) for shape in shapes.values())
        return nearest(budget, range(1, top + 1), lambda r: len(shapes) * r * r)

    def _R(self, theta_d: Tensor) -> list[Tensor]:
        return [
            R.unflatten(1, (r, r))
            for R, r in zip(theta_d.split([r * r for r in self.ranks], 1), self.ranks, strict=True)
        ]

    def _R_adjoint(self, grads: list[Tensor]) -> Tensor:
        return torch.cat([g.flatten(1) for g in grads], dim=1)

    def entries(self) -> Entries:
        """Row (i, k) of vec(B R) meets R_jk with B_ij; row (k, i) of vec(R A) meets R_kj with A_ji."""
        rows, columns, values, start = [], [], [], 0
        for F, r, (b, a) in zip(self.frozen(self.side), self.ranks, self.layout.pairs(), strict=True):
            long = F if self.side == "B" else F.T
            i, j, k = torch.meshgrid(*(torch.arange(n, device=F.device) for n in (len(long), r, r)), indexing="ij")
            rows.append(b.offset + i * r + k if self.side == "B" else a.offset + k * len(long) + i)
            columns.append(start + (j * r + k if self.side == "B" else k * r + j))
            values.append(long.unsqueeze(2).expand(-1, -1, r))
            start += r * r
        flat = [torch.cat([part.flatten() for part in parts]) for parts in (rows, columns, values)]
        return flat[0], flat[1], flat[2]

    def _R_matrix(self) -> Tensor:
        return torch.eye(self.d, dtype=torch.float64, device=self.device)

    def init_theta(self, seed: int = 0) -> Tensor:
        return 1e-5 * normal(seed, "theta_d", self.d)


@register("tinylora")
class TinyLoRA(SingularFactors):
    r"""R^l = sum_i v_i P_i^l: u numbers per group of modules, through frozen random P_i^l ~ N(0, 1/r).

    Maths:  B = U_r sqrt(S_r), A = sqrt(S_r) V_r^T. Groups: round(M (1 - weight_tying)) runs of M // groups modules in
            the order of the layout, the last one takes the rest. Starts at v = 0 (delta W = 0, gradient not).
    Claims: theta_d -> R has rank at most g r^2 for a group of g modules: u beyond it is redundant.
    Source: Morris et al. 2026, TinyLoRA; PEFT's TINYLORA, whose choice the law of P_i is.
    """

    formula = "R = sum_i v_i P_i, theta_D = (vec(U_r sqrt(S) R), vec(sqrt(S) V_r^T))"
    d_formula = "u * groups"
    source = "PEFT TINYLORA"
    claims = frozenset({"affine"})
    claims_if = {"local": "weight_tying=0"}
    variants = ({"u": 2}, {"u": 1, "weight_tying": 1.0, "side": "A"})
    power = (0.5, 0.5)

    def __init__(
        self,
        layout: LoRALayout,
        base_weights: Mapping[str, Tensor],
        seed: int = 0,
        u: int = 64,
        weight_tying: float = 0.0,
        side: str = "B",
    ):
        modules = len(layout.pairs())
        if u < 1 or not 0.0 <= weight_tying <= 1.0:
            raise ProjectionError(f"{self.name}: u >= 1 and weight_tying in [0, 1], got u={u}, {weight_tying}.")
        groups = max(1, round(modules * (1.0 - weight_tying)))
        self_group = [min(i // max(1, modules // groups), groups - 1) for i in range(modules)]
        super().__init__(layout, u * (1 + max(self_group)), seed, base_weights, side)
        self.u, self.group = u, self_group
        for i, r in enumerate(self.ranks):
            numbers = normal(seed, "tinylora.P", u * r * r, part=i) / r**0.5
            setattr(self, f"P_{i}", numbers.view(u, r, r))
        if weight_tying == 0.0:
            self.claims = self.claims | {"local"}

    @classmethod
    def draws(cls, layout: LoRALayout, d: int, u: int = 64, **_: Any) -> int:
        return u * sum(a.shape[0] ** 2 for _, a in layout.pairs())

    @classmethod
    def for_budget(cls, shapes: Mapping[str, tuple[int, int]], budget: int, r: int) -> Budget:
        u = max(1, round(budget / len(shapes)))
        return Budget(r, u * len(shapes), None, {"u": u})

    def _drawn(self, dtype: torch.dtype) -> list[Tensor]:
        return [getattr(self, f"P_{i}").to(dtype) for i in range(len(self.ranks))]

    def _R(self, theta_d: Tensor) -> list[Tensor]:
        v = theta_d.unflatten(1, (-1, self.u))
        drawn = self._drawn(theta_d.dtype)
        return [torch.einsum("nu,uij->nij", v[:, g], P) for g, P in zip(self.group, drawn, strict=True)]

    def _R_adjoint(self, grads: list[Tensor]) -> Tensor:
        sums = [grads[0].new_zeros(grads[0].shape[0], self.u) for _ in range(self.d // self.u)]
        for g, x, P in zip(self.group, grads, self._drawn(grads[0].dtype), strict=True):
            sums[g] = sums[g] + torch.einsum("nij,uij->nu", x, P)
        return torch.cat(sums, dim=1)

    def _R_matrix(self) -> Tensor:
        stacked = []
        for g, P in zip(self.group, self._drawn(torch.float64), strict=True):
            J = torch.zeros(P[0].numel(), self.d, dtype=torch.float64, device=P.device)
            J[:, g * self.u : (g + 1) * self.u] = P.flatten(1).T
            stacked.append(J)
        return torch.cat(stacked)

    def init_theta(self, seed: int = 0) -> Tensor:
        return torch.zeros(self.d, dtype=torch.float32)
