"""Uni-LoRA: a uniform random partition of theta_D, and the ablations of its paper."""

from __future__ import annotations

import re
from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import numpy as np
import torch
from torch import Tensor

from uniproj.errors import ProjectionError
from uniproj.kernels.deal import Group
from uniproj.kernels.random import bits
from uniproj.layout import LoRALayout
from uniproj.projections.partition import Partition
from uniproj.registry import register


@register("unilora")
class UniLoRA(Partition):
    r"""Every entry of theta_D copies one of d shared numbers, scaled to unit columns.

    Maths:  theta_D[i] = theta_d[index[i]] / sqrt(n_index[i]); P^T P = I_d.
    Index:  assignment="balanced": a keyed permutation mod d, n_j in {floor(D/d), ceil(D/d)};
            "iid": index[i] uniform on [0, d) as in the paper's text (columns may stay empty: an error);
            "peft": the indices of PEFT's UNILORA for proj_seed = seed, with its modules in `module_order`
            (its order of registration; names, or their positions in the layout), A before B.
    Start:  theta_d ~ U(-0.02, 0.02).
    Source: Li et al. 2025, Uni-LoRA, arXiv 2506.00799, section 3.
    """

    formula = "theta_D[i] = theta_d[index[i]] / sqrt(n)"
    source = "arXiv 2506.00799"
    version = 2
    claims = frozenset({"linear", "orthogonal", "isometric", "global_sharing"})
    claims_if = {"uniform": "assignment is 'balanced' or 'peft'"}
    variants = ({}, {"assignment": "iid"}, {"assignment": "peft"})

    def __init__(
        self,
        layout: LoRALayout,
        d: int,
        seed: int = 0,
        assignment: str = "balanced",
        module_order: Sequence[str] | Sequence[int] | None = None,
    ):
        self.check_d(layout, d)
        if assignment == "balanced":
            dealt: Tensor | list[Group] = [Group([slice(0, layout.D)], d, "unilora")]
        elif assignment == "iid":
            dealt = bits(seed, "unilora.iid", layout.D).mul_(d).bitwise_right_shift_(32).int()
        elif assignment == "peft":
            dealt = _peft_index(layout, d, seed, module_order)
        else:
            raise ProjectionError(f"{self.name}: assignment must be 'balanced', 'iid' or 'peft', got {assignment!r}.")
        super().__init__(layout, d, seed, dealt)
        if assignment != "iid":
            self.claims = self.claims | {"uniform"}


def _peft_index(layout: LoRALayout, d: int, seed: int, module_order: Sequence[str] | Sequence[int] | None) -> Tensor:
    """PEFT's balanced shuffle (peft.tuners.unilora.model.generate_index), moved into the order of the layout."""
    rng = np.random.default_rng(seed)
    dealt = np.repeat(np.arange(d), layout.D // d)
    if remaining := layout.D % d:
        dealt = np.concatenate([dealt, rng.choice(d, size=remaining, replace=False)])
    rng.shuffle(dealt)
    shuffled = torch.from_numpy(dealt)
    modules = layout.modules
    given = modules if module_order is None else module_order
    order = [modules[m] if isinstance(m, int) and 0 <= m < len(modules) else str(m) for m in given]
    place = {module: i for i, module in enumerate(order)}
    if place.keys() != set(modules) or len(order) != len(modules):
        odd = sorted(place.keys() ^ set(modules))[:1]
        raise ProjectionError(
            f"unilora: module_order must list every module once, {len(modules)} in all, got {len(order)} names"
            f"{f', and {odd[0]!r} on one side alone' if odd else ''}. Take the order of the base model."
        )
    blocks = sorted(layout.blocks, key=lambda b: (place[b.module], b.factor))
    index, taken = torch.empty(layout.D, dtype=torch.int32), 0
    for block in blocks:
        index[block.rows] = shuffled[taken : taken + block.numel]
        taken += block.numel
    return index


@register("unilora_local")
class LocalUniLoRA(Partition):
    r"""One partition per layer ("local" ablation): P = diag(P_1, .., P_L), still exactly isometric.

    d is shared out in proportion to each layer's rows (largest remainders, at least one each). A layer is
    the part of a module's name up to its last number (`per="layer"`), or the module itself (`per="module"`).
    Source: ablation of arXiv 2506.00799; which of the two the paper means is not stated in our sources.
    """

    formula = "theta_D = diag(P_1 .. P_L) theta_d, P_l a partition of layer l"
    source = "arXiv 2506.00799, ablation"
    version = 2
    claims = frozenset({"linear", "orthogonal", "isometric"})
    claims_if = {"local": "per='module'"}
    variants = ({}, {"per": "module"})

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0, per: str = "layer"):
        if per not in ("layer", "module"):
            raise ProjectionError(f"{self.name}: per must be 'layer' or 'module', got {per!r}.")
        self.check_d(layout, d)
        groups = _groups(layout, per)
        shares = _shares(d, [sum(piece.stop - piece.start for piece in rows) for rows in groups])
        dealt = [Group(rows, d, f"unilora.local.{k}") for k, (rows, d) in enumerate(zip(groups, shares, strict=True))]
        super().__init__(layout, d, seed, dealt)
        if per == "module":
            self.claims = self.claims | {"local"}

    @classmethod
    def min_d(cls, layout: LoRALayout) -> int:
        return len(layout.modules)


def _groups(layout: LoRALayout, per: str) -> list[list[slice]]:
    """Rows of theta_D by layer or by module, in the order of the layout."""
    members: dict[str, list[slice]] = {}
    for block in layout.blocks:
        layer = re.match(r"(?:.*\.)?\d+(?=\.|$)", block.module) if per == "layer" else None
        members.setdefault(layer.group() if layer else block.module, []).append(block.rows)
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


@register("unilora_nonuniform")
class NonUniformUniLoRA(Partition):
    r"""Separate, unequal subspaces for B and A ("non-uniform" ablation), still exactly isometric.

    Rows of B share columns [0, d_B), rows of A the rest, d_B = round(share_B d); with D_A close to D_B and
    share_B = 1/3 a column of B serves twice the rows of one of A.
    Source: ablation of arXiv 2506.00799; the paper's exact split is not stated in our sources.
    """

    formula = "theta_D = (P_B theta_1, P_A theta_2), partitions of unequal density"
    d_formula = "d (free), d_B = share_B d"
    source = "arXiv 2506.00799, ablation"
    version = 2
    claims = frozenset({"linear", "orthogonal", "isometric", "separates_factors"})
    needs_modules = True
    variants = ({}, {"share_B": 0.5})

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0, share_B: float = 1 / 3):
        if not 0 < share_B < 1:
            raise ProjectionError(f"{self.name}: share_B must lie in (0, 1), got {share_B}.")
        self.check_d(layout, d)
        layout.pairs()
        rows_B, rows_A = ([b.rows for b in layout.blocks if b.factor == factor] for factor in "BA")
        D_B = sum(b.numel for b in layout.blocks if b.factor == "B")
        D_A = layout.D - D_B
        d_B = min(max(round(share_B * d), 1, d - D_A), d - 1, D_B)
        dealt = [Group(rows_B, d_B, "unilora.B"), Group(rows_A, d - d_B, "unilora.A")]
        super().__init__(layout, d, seed, dealt)

    @classmethod
    def min_d(cls, layout: LoRALayout) -> int:
        return 2
