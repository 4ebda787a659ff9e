"""Fastfood: structured dense P from Hadamard transforms, O(D log d) time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from uniproj.kernels.gather import take
from uniproj.kernels.hadamard import hadamard, hadamard_matrix
from uniproj.kernels.permutation import permute
from uniproj.kernels.random import normal, signs
from uniproj.kernels.threads import cut
from uniproj.layout import LoRALayout
from uniproj.projection import Projection
from uniproj.registry import register

_CACHED, _AT_ONCE = 2**20, 2**26  # numbers transformed at once on the CPU, on a GPU
_DRAWN = 2**20  # places permuted at once


@register("fastfood")
class Fastfood(Projection):
    r"""Stacked blocks V_b = H G_b Pi_b H B_b / n', n' the power of two at or above d.

    Maths:  theta_D = first D rows of [V_1; V_2; ..] (theta_d, 0) / sqrt(D / n'), with B_b random signs, Pi_b a random
            permutation, G_b Gaussian and scaled to ||G_b||^2 = n', H H^T = n' I.
    Claims: columns have norm 1 in expectation (exactly where n' divides D), but P is less isometric than a
            dense Gaussian: the Gram matrix of one block averages chi-squared numbers.
    Cost:   2 D log2 n' adds each way, a few blocks at a time; state 13 bytes per row of whole blocks.
    Source: Le, Sarlos, Smola 2013, Fastfood (ICML), in the stacked layout of arXiv 2506.00799.
    """

    formula = "theta_D = [H G_b Pi_b H B_b]_b theta_d / sqrt(n' D)"
    source = "ICML 2013 (Le et al.); arXiv 2506.00799"
    version = 2
    claims = frozenset({"linear", "isometric_in_expectation", "global_sharing"})

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0):
        super().__init__(layout, d, seed)
        self.n = 1 << (d - 1).bit_length()
        self.blocks = -(-self.D // self.n)
        self.Pi, self.inverse = (torch.empty(self.blocks, self.n, dtype=torch.int32) for _ in range(2))
        B, numbers = [], []
        for blocks in cut(self.blocks, max(1, _DRAWN // self.n)):
            part = torch.arange(blocks.start, blocks.stop).unsqueeze(1)
            place = torch.arange(self.n).expand(len(part), -1)
            permutation = permute(place, self.n, seed, "fastfood.Pi", part)
            self.Pi[blocks] = permutation.int()
            self.inverse[blocks].scatter_(1, permutation, place.int())
            first, count = blocks.start * self.n, place.numel()
            B.append(signs(seed, "fastfood.B", count, start=first).to(torch.int8))
            numbers.append(self._numbers(first, count))
        self.B = torch.cat(B).view(-1, self.n)
        self.numbers = torch.cat(numbers).view(-1, self.n)
        self.norm = self.n**0.5 / self.numbers.double().norm(dim=1, keepdim=True)
        self.scale = 1.0 / (self.n * self.D) ** 0.5

    def _numbers(self, first: int, count: int) -> Tensor:
        """Of the diagonals G_b, one after the other, not yet scaled to their norm."""
        return normal(self.seed, "fastfood.G", count, start=first)

    @property
    def G(self) -> Tensor:
        """(blocks, n') float64."""
        return self.numbers.double() * self.norm

    def _matvec(self, theta_d: Tensor) -> Tensor:
        return torch.cat([piece for _, piece in self._pieces(theta_d)], dim=1)

    def at_rows(self, theta_d: Tensor, rows: Tensor) -> Tensor:
        rows = rows.to(theta_d.device)
        found = theta_d.new_empty(len(rows))
        for first, piece in self._pieces(theta_d.unsqueeze(0)):
            here = (rows >= first) & (rows < first + piece.shape[1])
            found[here] = piece[0, rows[here] - first]
        return found

    def _pieces(self, theta_d: Tensor) -> Iterator[tuple[int, Tensor]]:
        """theta_D (n, D) a few blocks at a time, each with its first row."""
        padded = torch.cat([theta_d, theta_d.new_zeros(theta_d.shape[0], self.n - self.d)], dim=1).unsqueeze(1)
        for blocks in self._groups(theta_d):
            x = self._permuted(hadamard(padded * self.B[blocks].to(padded.dtype)), self.Pi[blocks])
            x = hadamard(x * self.numbers[blocks].to(x.dtype)) * self._scales(blocks).to(x.dtype)
            yield blocks.start * self.n, x.reshape(x.shape[0], -1)[:, : self.D - blocks.start * self.n]

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        sums = []
        for blocks in self._groups(theta_D):
            y = theta_D[:, blocks.start * self.n : blocks.stop * self.n]
            missing = (blocks.stop - blocks.start) * self.n - y.shape[1]
            y = torch.cat([y, y.new_zeros(y.shape[0], missing)], dim=1).reshape(y.shape[0], -1, self.n)
            y = hadamard(y) * self.numbers[blocks].to(y.dtype)
            y = hadamard(self._permuted(y, self.inverse[blocks])) * self.B[blocks].to(y.dtype)
            sums.append(self._scales(blocks).to(y.dtype).T @ y)
        return torch.stack(sums).sum(0)[:, 0, : self.d]

    def _groups(self, x: Tensor) -> list[slice]:
        """Blocks transformed at once: their numbers stay in the cache, or fill a GPU."""
        return cut(self.blocks, max(1, (_CACHED if x.device.type == "cpu" else _AT_ONCE) // (len(x) * self.n)))

    def _scales(self, blocks: slice) -> Tensor:
        return self.norm[blocks] * self.scale

    def _permuted(self, x: Tensor, places: Tensor) -> Tensor:
        """x (n, blocks, n') with element places[b, i] of block b at i."""
        first = torch.arange(0, places.numel(), self.n, dtype=torch.int32, device=places.device)
        index = (places + first.unsqueeze(1)).flatten()
        return take(x.reshape(x.shape[0], -1), index, len(index), x.dtype).reshape(x.shape)

    def to_dense(self) -> Tensor:
        H = hadamard_matrix(self.n.bit_length() - 1, device=self.B.device)
        eye = torch.eye(self.n, dtype=torch.float64, device=H.device)
        stacked = [
            H @ torch.diag(G) @ eye[Pi] @ H @ torch.diag(B.double())
            for B, G, Pi in zip(self.B, self.G, self.Pi, strict=True)
        ]
        return torch.cat(stacked)[: self.D, : self.d] * self.scale
