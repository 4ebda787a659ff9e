"""Uni-LoRA with separate partitions of B and A."""

from uniproj.errors import ProjectionError
from uniproj.kernels.deal import Group
from uniproj.layout import LoRALayout
from uniproj.projections._partition import Partition
from uniproj.registry import register


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

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0, *, share_B: float = 1 / 3):
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
