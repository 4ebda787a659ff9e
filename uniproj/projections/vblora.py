"""VB-LoRA: sub-vectors of the factors are mixtures of k out of h trained vectors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uniproj.budget import TOLERANCE, Budget
from uniproj.errors import ProjectionError
from uniproj.kernels.random import normal
from uniproj.kernels.topk import largest, mix, vectors_gradient
from uniproj.layout import Block, LoRALayout
from uniproj.projection import Entries, Projection
from uniproj.registry import register


@register("vblora")
class VBLoRA(Projection):
    r"""theta_d is h vectors of length b (the paper's vector bank); every length-b piece of a factor mixes k of them.

    Maths:  piece s = sum over the k largest logits of softmax(logits[s, top k]) vectors[top k]; pieces run along the
            rows of A and down the columns of B. P(logits) = (W kron I_b) up to the order of rows, W row-sparse: a
            *learned* projection, linear in the vectors for fixed logits.
    Shapes: theta_d (h b,); logits (D / b, h), row s in the order (B: out/b, r; A: r, in/b) of the layout.
    Start:  vectors U(+-0.02), logits N(0, init_logits_std^2).
    Raises: ProjectionError unless b divides every in and out and 1 <= topk <= h.
    Source: Li et al. 2024, VB-LoRA, arXiv 2405.15179, section 3; PEFT's VBLORA.
    """

    formula = "theta_D = (W(logits) kron I_b) theta_d, W top-k softmax"
    d_formula = "h b, and D h / b logits"
    source = "arXiv 2405.15179"
    claims = frozenset({"linear", "global_sharing"})
    free_d = False
    learned = True
    sparse = True
    needs_modules = True
    places: Tensor
    variants = ({}, {"topk": 1}, {"num_vectors": 3, "vector_length": 1, "topk": 3})

    def __init__(
        self,
        layout: LoRALayout,
        seed: int = 0,
        *,
        num_vectors: int | None = None,
        vector_length: int | None = None,
        topk: int = 2,
        init_logits_std: float = 0.1,
    ):
        h, b = self._sizes(layout, num_vectors, vector_length, topk)
        super().__init__(layout, h * b, seed)
        self.h, self.b, self.topk = h, b, topk
        self.places = torch.cat([_places(block, b) for block in layout.blocks])
        pieces = layout.D // b
        start = init_logits_std * normal(seed, "vblora.logits", pieces * h)
        self.logits = nn.Parameter(start.view(pieces, h))

    @classmethod
    def _sizes(
        cls, layout: LoRALayout, num_vectors: int | None, vector_length: int | None, topk: int
    ) -> tuple[int, int]:
        """(h, b)."""
        sizes = [size for out, in_ in layout.shapes().values() for size in (out, in_)]
        b = vector_length or _largest_divisor(math.gcd(*sizes), 256)
        if b < 1 or any(size % b for size in sizes):
            raise ProjectionError(
                f"{cls.name}: vector_length must divide every in and out, got {b}. Their greatest common divisor is "
                f"{math.gcd(*sizes)}."
            )
        h = num_vectors or min(256, max(topk, layout.D // (4 * b)))
        if not 1 <= topk <= h:
            raise ProjectionError(f"{cls.name}: topk must lie in [1, num_vectors] = [1, {h}], got {topk}.")
        return h, b

    @classmethod
    def parameter_shapes(
        cls,
        layout: LoRALayout,
        d: int,
        num_vectors: int | None = None,
        vector_length: int | None = None,
        topk: int = 2,
        **_: Any,
    ) -> dict[str, tuple[int, int]]:
        h, b = cls._sizes(layout, num_vectors, vector_length, topk)
        return {"logits": (layout.D // b, h)}

    @classmethod
    def for_budget(cls, shapes: Mapping[str, tuple[int, int]], budget: int, r: int) -> Budget:
        D = LoRALayout.from_shapes(shapes, r).D
        common = math.gcd(*[size for shape in shapes.values() for size in shape])
        found = []
        for b in (b for b in range(1, common + 1) if common % b == 0):
            h = max(2, round(budget / (b + D // b)))
            extra = {"num_vectors": h, "vector_length": b}
            if h * b <= D:
                found.append(Budget(r, h * b + h * (D // b), None, extra))
        if not found:
            raise ProjectionError(f"{cls.name}: no vectors of any length fit these modules at r={r}, D={D}. Raise r.")
        # within the tolerance the most vectors, as few cannot mix; then the most logits, which outnumber the entries of
        # the vectors in the published sizes too
        near = [f for f in found if abs(f.error(budget)) <= TOLERANCE]
        if near:
            return max(near, key=lambda f: (f.hyperparameters["num_vectors"], -f.hyperparameters["vector_length"]))
        return min(found, key=lambda f: abs(f.error(budget)))

    def _top_k(self) -> tuple[Tensor, Tensor]:
        """Weights and indices of the k vectors of every piece, each (D / b, topk)."""
        index = largest(self.logits, self.topk)
        return self.logits.gather(-1, index).softmax(-1), index

    def _matvec(self, theta_d: Tensor) -> Tensor:
        vectors = theta_d.view(-1, self.h, self.b)
        return mix(vectors, *self._top_k(), self.places, [self.D, self.h, self.b], theta_d.dtype)

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        sizes = [self.D, self.h, self.b]
        return vectors_gradient(theta_D, *self._top_k(), self.places, sizes, theta_D.dtype).flatten(1)

    def entries(self) -> Entries:
        weights, index = self._top_k()
        piece, within = (torch.cat(parts).to(index.device) for parts in zip(*self._pieces(), strict=True))
        rows = torch.arange(self.D, device=index.device).repeat_interleave(self.topk)
        columns = (index[piece] * self.b + within.unsqueeze(1)).flatten()
        return rows, columns, weights[piece].double().flatten()

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Block by block, for every coordinate its piece and its place within that."""
        for block in self.layout.blocks:
            rows, columns = block.shape
            i, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            if block.factor == "B":
                piece, within = i // self.b * columns + j, i % self.b
            else:
                piece, within = i * (columns // self.b) + j // self.b, j % self.b
            yield (block.offset // self.b + piece).flatten(), within.flatten()


def _places(block: Block, b: int) -> Tensor:
    """(pieces, 2): the first coordinate of every piece of a block, and the step from one to the next."""
    # pieces of one number lie one after another in both factors
    step = block.shape[1] if block.factor == "B" and b > 1 else 1
    piece = torch.arange(block.numel // b)
    start = block.offset + piece // step * step * b + piece % step
    return torch.stack([start, torch.full_like(start, step)], dim=1)


def _largest_divisor(n: int, limit: int) -> int:
    return max(b for b in range(1, min(n, limit) + 1) if n % b == 0)
