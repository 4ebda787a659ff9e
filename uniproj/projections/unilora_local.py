"""Uni-LoRA with a partition per layer or module."""

from __future__ import annotations

import re
from collections.abc import Sequence
from heapq import heapify, heappop, heappush

from uniproj.errors import ProjectionError
from uniproj.kernels.deal import Group
from uniproj.layout import LoRALayout
from uniproj.projections._partition import Partition
from uniproj.registry import register


@register("unilora_local")
class LocalUniLoRA(Partition):
    r"""One partition per layer ("local" ablation): P = diag(P_1, .., P_L), still exactly isometric.

    d is shared out in proportion to each layer's rows (largest remainders, at least one each). A layer is
    the part of a module's name up to its last number, for an expert of that of all its experts (`per="layer"`), or the
    module itself (`per="module"`).
    Source: ablation of arXiv 2506.00799; which of the two the paper means is not stated in our sources.
    """

    formula = "theta_D = diag(P_1 .. P_L) theta_d, P_l a partition of layer l"
    source = "arXiv 2506.00799, ablation"
    version = 2
    claims = frozenset({"linear", "orthogonal", "isometric"})
    claims_if = {"local": ("per='module'", lambda P: P.per == "module")}
    variants = ({}, {"per": "module"})

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0, *, per: str = "layer"):
        if per not in ("layer", "module"):
            raise ProjectionError(f"{self.name}: per must be 'layer' or 'module', got {per!r}.")
        self.check_d(layout, d)
        groups = _groups(layout, per)
        shares = _shares(d, [sum(piece.stop - piece.start for piece in rows) for rows in groups])
        dealt = [Group(rows, d, f"unilora.local.{k}") for k, (rows, d) in enumerate(zip(groups, shares, strict=True))]
        super().__init__(layout, d, seed, dealt)
        self.per = per

    @classmethod
    def min_d(cls, layout: LoRALayout) -> int:
        return len(layout.modules)


def _groups(layout: LoRALayout, per: str) -> list[list[slice]]:
    """Rows of theta_D by layer or by module, in the order of the layout."""
    members: dict[str, list[slice]] = {}
    for block in layout.blocks:
        name = block.module
        if per == "layer":
            name = layout.site_of.get(name, name)
            layer = re.match(r"(?:.*\.)?\d+(?=\.|$)", name)
            name = layer.group() if layer else name
        members.setdefault(name, []).append(block.rows)
    return list(members.values())


def _shares(d: int, sizes: Sequence[int]) -> list[int]:
    """d split in proportion to the sizes: at least 1 and at most the size each, by largest remainders."""
    D = sum(sizes)
    shares = [max(1, d * size // D) for size in sizes]
    missing = d - sum(shares)
    step = 1 if missing > 0 else -1

    def first(i: int) -> tuple[float, int]:
        """Smallest for the share that is furthest from its proportion."""
        return step * (shares[i] - d * sizes[i] / D), i

    movable = [first(i) for i, n in enumerate(shares) if 1 <= n + step <= sizes[i]]
    heapify(movable)
    for _ in range(abs(missing)):
        _, i = heappop(movable)
        shares[i] += step
        if 1 <= shares[i] + step <= sizes[i]:
            heappush(movable, first(i))
    return shares
