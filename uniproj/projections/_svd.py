"""A small matrix R between frozen singular factors of the base weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from uniproj.errors import ProjectionError
from uniproj.kernels.svd import truncated_svd
from uniproj.layout import LoRALayout
from uniproj.projection import Projection


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

    def _stacks(self, letter: str, dtype: torch.dtype | None = None) -> list[Tensor]:
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
        return self._place([stack.unsqueeze(0) for stack in self._stacks(other)], other).squeeze(0)

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
