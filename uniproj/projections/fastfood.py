"""Fastfood: structured dense P from Hadamard transforms, O(D log d) time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uniproj.kernels.fastfood import adjoint, diagonal, length, packed, product
from uniproj.kernels.forms import widest
from uniproj.kernels.hadamard import hadamard_matrix
from uniproj.kernels.permutation import images, round_tables
from uniproj.kernels.random import bits, normal
from uniproj.kernels.threads import cut
from uniproj.layout import LoRALayout
from uniproj.projection import Projection
from uniproj.registry import register

_DRAWN = 2**18  # numbers drawn, or rows of theta_D computed, at once


@register("fastfood")
class Fastfood(Projection):
    r"""Stacked blocks V_b = H G_b Pi_b H B_b / n', n' the power of two at or above d.

    Maths:  theta_D = first D rows of [V_1; V_2; ..] (theta_d, 0) / sqrt(D / n'), with B_b random signs, Pi_b a random
            permutation, G_b Gaussian and scaled to ||G_b||^2 = n', H H^T = n' I.
    Claims: columns have norm 1 in expectation (exactly where n' divides D), but P is less isometric than a
            dense Gaussian: the Gram matrix of one block averages chi-squared numbers.
    Cost:   2 D log2 n' adds each way, a few blocks at a time; state per row of whole blocks: 4 bytes of G, a bit of B,
            and 24 / sqrt(n') bytes of tables, from which Pi is computed. The plain torch path keeps Pi, 4 bytes more.
    Source: Le, Sarlos, Smola 2013, Fastfood (ICML), in the stacked layout of arXiv 2506.00799.
    """

    formula = "theta_D = [H G_b Pi_b H B_b]_b theta_d / sqrt(n' D)"
    source = "ICML 2013 (Le et al.); arXiv 2506.00799"
    version = 2
    claims = frozenset({"linear", "isometric_in_expectation", "global_sharing"})
    casts = True

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0):
        super().__init__(layout, d, seed)
        self.n = length(d)
        self.blocks = -(-self.D // self.n)
        self.scale = 1.0 / (self.n * self.D) ** 0.5
        drawn = [self._drawn(blocks) for blocks in self._parts()]
        self._B, self._G, self._tables, self.norm = (torch.cat(parts) for parts in zip(*drawn, strict=True))

    def _parts(self) -> list[slice]:
        """The blocks, a few at a time; one of few numbers takes a whole word of signs."""
        return cut(self.blocks, max(1, _DRAWN // max(self.n, 32)))

    def _drawn(self, blocks: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """B, G, the tables of Pi and what scales G to its norm, of some blocks."""
        G = self._numbers(blocks)
        tables = round_tables(self.n, self.seed, "fastfood.Pi", blocks.stop - blocks.start, blocks.start)
        norm = self.n**0.5 / diagonal(G, self.n, torch.float64).norm(dim=1, keepdim=True)
        return packed(self._bits("fastfood.B", blocks)), G, tables, norm

    def _numbers(self, blocks: slice) -> Tensor:
        """Of the diagonals G_b, not yet scaled to their norm: (blocks, n') float32, or signs as `packed` gives them."""
        count = (blocks.stop - blocks.start) * self.n
        return normal(self.seed, "fastfood.G", count, start=blocks.start * self.n).view(-1, self.n)

    def _bits(self, stream: str, blocks: slice) -> Tensor:
        """(blocks, n') of 0 and 1, that of the sign -1."""
        count = (blocks.stop - blocks.start) * self.n
        return (bits(self.seed, stream, count, start=blocks.start * self.n) & 1).view(-1, self.n)

    @property
    def B(self) -> Tensor:
        """(blocks, n') float64."""
        return diagonal(self._B, self.n, widest(self.device))

    @property
    def G(self) -> Tensor:
        """(blocks, n') float64."""
        return diagonal(self._G, self.n, widest(self.device)) * self.norm

    @property
    def Pi(self) -> Tensor:
        """(blocks, n') int32: (Pi_b z)[i] = z[Pi[b, i]]."""
        return images(self.n, self._tables.cpu()).to(self.device)

    def _constants(self, blocks: slice | None = None) -> list[Any]:
        """Of some blocks, or all, as the operators take them."""
        everything = [self._B, self._G, self._tables, self.norm.flatten() * self.scale]
        if blocks is None:
            return [*everything, [self.D, self.d]]
        parts = [constant.unflatten(0, (self.blocks, -1))[blocks].flatten(0, 1) for constant in everything]
        return [*parts, [min(self.D, blocks.stop * self.n) - blocks.start * self.n, self.d]]

    def _matvec(self, theta_d: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return product(theta_d, *self._constants(), dtype or theta_d.dtype)

    def _rmatvec(self, theta_D: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return adjoint(theta_D, *self._constants(), dtype or theta_D.dtype)

    def at_rows(self, theta_d: Tensor, rows: Tensor) -> Tensor:
        """(P theta_d)[rows], a few blocks at a time."""
        rows = rows.to(theta_d.device)
        found = theta_d.new_empty(len(rows))
        for blocks in self._parts():
            piece = product(theta_d.unsqueeze(0), *self._constants(blocks), theta_d.dtype)[0]
            first = blocks.start * self.n
            here = (rows >= first) & (rows < first + len(piece))
            found[here] = piece[rows[here] - first]
        return found

    def to_dense(self) -> Tensor:
        H = hadamard_matrix(self.n.bit_length() - 1, device=self.device)
        eye = torch.eye(self.n, dtype=torch.float64, device=H.device)
        stacked = [
            H @ torch.diag(G) @ eye[Pi] @ H @ torch.diag(B) for B, G, Pi in zip(self.B, self.G, self.Pi, strict=True)
        ]
        return torch.cat(stacked)[: self.D, : self.d] * self.scale
