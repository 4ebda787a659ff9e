"""Uni-LoRA: a uniform random partition of theta_D."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from uniproj.errors import ProjectionError
from uniproj.kernels.deal import Group
from uniproj.kernels.random import bits
from uniproj.layout import LoRALayout
from uniproj.projections._partition import Partition
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
    claims_if = {"uniform": ("assignment is 'balanced' or 'peft'", lambda P: P.assignment != "iid")}
    variants = ({}, {"assignment": "iid"}, {"assignment": "peft"})

    def __init__(
        self,
        layout: LoRALayout,
        d: int,
        seed: int = 0,
        *,
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
        self.assignment = assignment


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
