"""Fastfood: structured dense P from Hadamard transforms, O(D log d) time."""

from __future__ import annotations

import torch
from torch import Tensor

from uniproj.kernels.hadamard import hadamard, hadamard_matrix
from uniproj.kernels.permutation import permute
from uniproj.kernels.random import normal, signs
from uniproj.layout import LoRALayout
from uniproj.projection import Projection
from uniproj.registry import register


@register("fastfood")
class Fastfood(Projection):
    r"""Stacked blocks V_b = H G_b Pi_b H B_b / n', n' the power of two at or above d.

    Maths:  theta_D = first D rows of [V_1; V_2; ..] (theta_d, 0) / sqrt(D / n'), with B_b random signs, Pi_b a random
            permutation, G_b Gaussian and scaled to ||G_b||^2 = n', H H^T = n' I.
    Claims: columns have norm 1 in expectation (exactly where n' divides D), but P is less isometric than a
            dense Gaussian: the Gram matrix of one block averages chi-squared numbers.
    Cost:   2 D log2 n' adds each way; state 20 bytes per row.
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
        total = self.blocks * self.n
        row = torch.arange(total)
        permutation = permute(row % self.n, self.n, seed, "fastfood.Pi", row // self.n)
        self.register_buffer("B", signs(seed, "fastfood.B", total).view(-1, self.n), persistent=False)
        self.register_buffer("G", self._diagonal(total).view(-1, self.n), persistent=False)
        self.register_buffer("Pi", permutation.view(-1, self.n), persistent=False)
        self.B: Tensor
        self.G: Tensor
        self.Pi: Tensor
        self.scale = 1.0 / (self.n * self.D) ** 0.5

    def _diagonal(self, total: int) -> Tensor:
        G = normal(self.seed, "fastfood.G", total).double().view(-1, self.n)
        return G * (self.n**0.5 / G.norm(dim=1, keepdim=True))

    def _matvec(self, theta_d: Tensor) -> Tensor:
        x = torch.nn.functional.pad(theta_d, (0, self.n - self.d)).unsqueeze(1) * self.B.to(theta_d.dtype)
        x = hadamard(x).gather(2, self.Pi.expand(len(x), -1, -1)) * self.G.to(theta_d.dtype)
        return hadamard(x).flatten(1)[:, : self.D] * self.scale

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        x = torch.nn.functional.pad(theta_D, (0, self.blocks * self.n - self.D)).unflatten(1, (self.blocks, self.n))
        x = hadamard(x) * self.G.to(theta_D.dtype)
        x = torch.zeros_like(x).scatter(2, self.Pi.expand(len(x), -1, -1), x)
        return (hadamard(x) * self.B.to(theta_D.dtype)).sum(1)[:, : self.d] * self.scale

    def to_dense(self) -> Tensor:
        H = hadamard_matrix(self.n.bit_length() - 1, device=self.B.device)
        eye = torch.eye(self.n, dtype=torch.float64, device=H.device)
        stacked = [
            H @ torch.diag(G.double()) @ eye[Pi] @ H @ torch.diag(B.double())
            for B, G, Pi in zip(self.B, self.G, self.Pi, strict=True)
        ]
        return torch.cat(stacked)[: self.D, : self.d] * self.scale


@register("fastfood_sign")
class SignFastfood(Fastfood):
    r"""Fastfood with random signs in place of the Gaussian diagonal: each block is orthogonal.

    Exactly isometric where n' divides D; otherwise the cut last block costs one or two per cent.
    Source: the H D H D construction of Choromanski et al. 2017, arXiv 1703.00864, in Fastfood's place.
    """

    formula = "theta_D = [H D_b Pi_b H B_b]_b theta_d / sqrt(n' D), D_b signs"
    source = "arXiv 1703.00864"
    claims_if = {"isometric": "n' divides D", "orthogonal": "n' divides D"}

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0):
        super().__init__(layout, d, seed)
        if self.D % self.n == 0:
            self.claims = self.claims | {"isometric", "orthogonal"}

    def _diagonal(self, total: int) -> Tensor:
        return signs(self.seed, "fastfood.D", total)
