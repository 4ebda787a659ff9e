"""Fastfood with signs in place of Gaussian numbers."""

from torch import Tensor

from uniproj.kernels.fastfood import packed
from uniproj.projections.fastfood import Fastfood
from uniproj.registry import register


@register("fastfood_sign")
class SignFastfood(Fastfood):
    r"""Fastfood with random signs in place of the Gaussian diagonal: each block is orthogonal.

    Exactly isometric where n' divides D; otherwise the cut last block costs one or two per cent. State: two bits
    per row of whole blocks in place of Fastfood's 33.
    Source: the H D H D construction of Choromanski et al. 2017, arXiv 1703.00864, in Fastfood's place.
    """

    formula = "theta_D = [H D_b Pi_b H B_b]_b theta_d / sqrt(n' D), D_b signs"
    source = "arXiv 1703.00864"
    claims_if = dict.fromkeys(("isometric", "orthogonal"), ("n' divides D", lambda P: P.D % P.n == 0))

    def _numbers(self, blocks: slice) -> Tensor:
        return packed(self._bits("fastfood.D", blocks))
