"""Uni-LoRA without column normalisation."""

from uniproj.kernels.deal import Group
from uniproj.layout import LoRALayout
from uniproj.projections._partition import Partition
from uniproj.registry import register


@register("unilora_unnormalised")
class UnnormalisedUniLoRA(Partition):
    r"""theta_D[i] = theta_d[index[i]]: P^T P = diag(n_j), n_j in {floor(D/d), ceil(D/d)}.

    With balanced counts it is Uni-LoRA at sqrt(n) times the initial bound and learning rate, not another
    geometry. Source: ablation of Uni-LoRA, arXiv 2506.00799.
    """

    formula = "theta_D[i] = theta_d[index[i]]"
    source = "arXiv 2506.00799, ablation"
    version = 2
    claims = frozenset({"linear", "orthogonal", "uniform", "global_sharing"})

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0):
        self.check_d(layout, d)
        super().__init__(layout, d, seed, [Group([slice(0, layout.D)], d, "unilora")], normalise=False)
