"""A small matrix R between frozen singular factors of the base weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from uniproj.errors import ProjectionError
from uniproj.kernels.grouped import block_table, product, transpose_product
from uniproj.kernels.svd import truncated_svd
from uniproj.layout import LoRALayout
from uniproj.projection import Projection

_APART = ("_matvec", "_rmatvec", "matvec", "rmatvec", "offset")


class SingularFactors(Projection):
    """delta W^l = B^l R^l A^l with frozen B^l (out, r), A^l (r, in) from the SVD of W^l, and R^l(theta_d) linear.

    R is absorbed by one side, the other is c: side="B" gives theta_D = [vec(B R); vec A], side="A"
    [vec B; vec(R A)]. delta W is the same; P, and whether it is isometric, is not. State: 8 bytes per coordinate,
    `factors` (D,), which is theta_D where every R is the identity.

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
        self.factors = torch.empty(layout.D, dtype=torch.float64)
        for B, A, (b, a) in zip(self.frozen("B"), self.frozen("A"), layout.pairs(), strict=True):
            wanted = (b.shape[0], a.shape[1])
            W = base_weights.get(b.module)
            if W is None or tuple(W.shape) != wanted:
                found = "none" if W is None else tuple(W.shape)
                raise ProjectionError(
                    f"{self.name}: {b.module} needs a base weight of shape {wanted}, got {found}. "
                    "Pass base_weights={name: (out, in) tensor}."
                )
            U, S, Vh = truncated_svd(W, a.shape[0], seed)
            B.copy_(U * S ** self.power[0])
            A.copy_((S ** self.power[1]).unsqueeze(1) * Vh)
        self.table, self.sizes = self._blocks()

    def frozen(self, letter: str) -> list[Tensor]:
        """The factor B^l (out, r) or A^l (r, in) of every module; views of P's own numbers."""
        return self.layout.split(self.factors)["BA".index(letter) :: 2]

    def _blocks(self) -> tuple[Tensor, list[int]]:
        """Of every module B R, or A^T R^T, in the place of that factor; and the other one, as a column, times 1."""
        squares = [r * r for r in self.ranks]
        *R, one = torch.empty(sum(squares) + 1).split([*squares, 1])
        blocks = []
        for x, r, B, A in zip(R, self.ranks, self.frozen("B"), self.frozen("A"), strict=True):
            moved, matrix, still = (B, x.view(r, r), A) if self.side == "B" else (A.T, x.view(r, r).T, B)
            column = still.flatten().unsqueeze(1)
            blocks += [(moved, moved, matrix), (column, column, one.view(1, 1))]
        return block_table(blocks, self.D, sum(squares) + 1, constants=1)

    @abstractmethod
    def _R(self, theta_d: Tensor) -> Tensor:
        """(n, d) -> (n, sum r^2): the stacked vec(R^l) of all modules."""

    @abstractmethod
    def _R_adjoint(self, grad: Tensor) -> Tensor:
        """The adjoint of `_R`: (n, sum r^2) -> (n, d)."""

    def forward(self, theta_d: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """As of every projection; c is written in the same pass, unless a subclass writes one of the maps or c anew."""
        if any(getattr(type(self), name) is not getattr(SingularFactors, name) for name in _APART):
            return super().forward(theta_d, dtype)
        self._refuse_undeclared()
        self._check(theta_d, "theta_d", "d", self.d)
        return self._batched(self._affine, theta_d, self.D, dtype or theta_d.dtype)

    def _affine(self, theta_d: Tensor, one: float = 1.0) -> Tensor:
        """(n, d) -> (n, D): P theta_d + c times `one`."""
        x = torch.cat([self._R(theta_d), theta_d.new_full((theta_d.shape[0], 1), one)], dim=1)
        return product(x, self.factors, self.table, self.sizes, theta_d.dtype)

    def _matvec(self, theta_d: Tensor) -> Tensor:
        return self._affine(theta_d, 0.0)

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        of_x = transpose_product(theta_D, self.factors, self.table, self.sizes, theta_D.dtype)
        return self._R_adjoint(of_x[:, :-1])

    @property
    def offset(self) -> Tensor:
        return self._affine(self.factors.new_zeros(1, self.d)).squeeze(0)

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
