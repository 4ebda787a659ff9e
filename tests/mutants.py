"""Broken projections. Each lists the named checks of the battery that must catch it."""

from __future__ import annotations

import torch
from torch import Tensor

from uniproj import LoRALayout, Projection
from uniproj.projections._partition import Partition
from uniproj.projections.fastfood_sign import SignFastfood
from uniproj.projections.gaussian import Gaussian
from uniproj.projections.lora_xs import LoRAXS
from uniproj.projections.nola import NOLA
from uniproj.projections.unilora import UniLoRA
from uniproj.projections.unilora_local import LocalUniLoRA
from uniproj.projections.vblora import VBLoRA
from uniproj.projections.vera import VeRA


class ScaledAdjoint(UniLoRA):
    name, caught_by = "scaled_adjoint", {"adjoint_dot_test", "dense_equals_rmatvec", "autograd_equals_adjoint"}

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        return 1.001 * super()._rmatvec(theta_D)


class FastfoodReferenceGradient(SignFastfood):
    """The gradient of a published Fastfood: P^T g / n."""

    name, caught_by = "fastfood_gradient", {"adjoint_dot_test", "autograd_equals_adjoint"}

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        return super()._rmatvec(theta_D) / self.n


class SwappedIndex(UniLoRA):
    """Two rows exchange their columns in the forward map only."""

    name, caught_by = "swapped_index", {"adjoint_dot_test", "dense_equals_matvec", "gradcheck"}

    def _matvec(self, theta_d: Tensor) -> Tensor:
        other = next(i for i in range(self.D) if self.index[i] != self.index[0])
        rows = torch.arange(self.D)
        rows[0], rows[other] = other, 0
        return super()._matvec(theta_d)[:, rows]


class NoNormalisation(UniLoRA):
    """Claims to be isometric with unit entries."""

    name, caught_by = "no_normalisation", {"claim:isometric"}

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0):
        super().__init__(layout, d, seed)
        self.scale = torch.ones_like(self.scale)


class StaleNormaliser(UniLoRA):
    """Scales looked up with another draw of the indices, as in the code of the Uni-LoRA paper's GLUE runs."""

    name, caught_by = "stale_normaliser", {"claim:isometric"}

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0):
        super().__init__(layout, d, seed)
        self.scale = self.scale[torch.randperm(d, generator=torch.Generator().manual_seed(1))]
        counts = torch.bincount(self.index, minlength=d)
        assert counts.min() != counts.max()


class OffByOneBlock(LocalUniLoRA):
    """Every layer's rows start one too late, so the last row of a module sits in the next one's block."""

    name, caught_by = "off_by_one_block", {"claim:local"}

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0):
        super().__init__(layout, d, seed, per="module")
        self.index = self.index.roll(1)


class OffByOneSplit(NOLA):
    """theta_d is cut one number late: the blocks of P meet the wrong coefficients."""

    name, caught_by = "off_by_one_split", {"dense_equals_matvec", "adjoint_dot_test"}

    def _matvec(self, theta_d: Tensor) -> Tensor:
        return super()._matvec(theta_d.roll(1, dims=1))


class OverwriteForAdd(UniLoRA):
    name, caught_by = "overwrite_for_add", {"dense_equals_rmatvec", "adjoint_dot_test"}

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        last = theta_D.new_zeros(len(theta_D), self.d).index_copy(1, self.index.long(), theta_D)
        return last * self.scale.to(theta_D.dtype)


class HalfPrecisionScale(UniLoRA):
    """Scales rounded to bfloat16, as PEFT does on a bfloat16 base."""

    name, caught_by = "half_precision_scale", {"claim:isometric"}

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0):
        super().__init__(layout, d, seed)
        self.scale = self.scale.bfloat16().double()


class RoundedByCast(UniLoRA):
    name, caught_by = "rounded_by_cast", {"cast_never_rounds_P"}

    def _apply(self, fn, recurse: bool = True):
        self.scale = fn(self.scale)
        return self


class GlobalGenerator(UniLoRA):
    name, caught_by = "global_generator", {"global_generator_untouched", "rebuild_is_bit_equal"}

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0):
        super().__init__(layout, d, seed)
        self.index = self.index[torch.randperm(layout.D)]


class Gaussian1OverD(Gaussian):
    """Variance 1 / d where 1 / D is meant."""

    name, caught_by = "gaussian_variance", {"claim:isometric_in_expectation"}

    def _rows(self, first: int, last: int) -> Tensor:
        return super()._rows(first, last) * (self.D / self.d) ** 0.5


class UnevenGaussian(Gaussian):
    """Column variances 0.25 and 1.75 in turn: their mean is right."""

    name, caught_by = "uneven_gaussian", {"claim:isometric_in_expectation"}

    def _rows(self, first: int, last: int) -> Tensor:
        return super()._rows(first, last) * (0.25 + 1.5 * (torch.arange(self.d) % 2)).sqrt()


class TransposedBlock(LoRAXS):
    """R and R^T confused: right only for symmetric R."""

    name, caught_by = "transposed_block", {"dense_equals_matvec", "adjoint_dot_test"}

    def _R(self, theta_d: Tensor) -> Tensor:
        sizes = [r * r for r in self.ranks]
        R = [x.unflatten(1, (r, r)).mT for x, r in zip(theta_d.split(sizes, 1), self.ranks, strict=True)]
        return torch.cat([x.flatten(1) for x in R], dim=1)


class StartsAtTheSaddle(UniLoRA):
    name, caught_by = "starts_at_the_saddle", {"start_is_not_the_saddle"}

    def init_theta(self, seed: int = 0) -> Tensor:
        return torch.zeros(self.d)


class NotLinear(UniLoRA):
    name, caught_by = "not_linear", {"claim:linear", "dense_equals_matvec"}

    def _matvec(self, theta_d: Tensor) -> Tensor:
        return super()._matvec(theta_d + 0.1 * theta_d**2)


class DetachedLogits(VBLoRA):
    """A learned projection whose logits get no gradient."""

    name, caught_by = "detached_logits", {"gradcheck"}

    def _top_k(self) -> tuple[Tensor, Tensor]:
        weights, index = super()._top_k()
        return weights.detach() + 0.0 * weights, index


class GraphBreak(UniLoRA):
    name, caught_by = "graph_break", {"compiles"}

    def _matvec(self, theta_d: Tensor) -> Tensor:
        if float(theta_d.sum()) > 1e30:
            theta_d = theta_d * 2
        torch._dynamo.graph_break()
        return super()._matvec(theta_d)


class BufferedIndex(Partition):
    """Keeps its index where averages and state dicts find it."""

    name, caught_by = "buffered_index", {"state_holds_only_parameters", "averaging"}

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0):
        super().__init__(layout, d, seed, torch.arange(layout.D) % d)
        del self._index
        torch.nn.Module.register_buffer(self, "_index", (torch.arange(layout.D) % d).int())


class CannotBeCopied(UniLoRA):
    name, caught_by = "cannot_be_copied", {"copies"}

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0):
        super().__init__(layout, d, seed)
        self.double = lambda x: 2 * x


class LosesItsSeed(UniLoRA):
    """A copy draws anew, from another seed."""

    name, caught_by = "loses_its_seed", {"copies"}

    def __setstate__(self, state) -> None:
        super().__setstate__({**state, **UniLoRA(state["layout"], state["d"], state["seed"] + 1).__dict__})


class LearnedInSecret(Partition):
    """Holds a Parameter and does not say so: it would never be trained."""

    name, caught_by = "learned_in_secret", {"gradcheck", "autograd_equals_adjoint"}

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0):
        super().__init__(layout, d, seed, torch.arange(layout.D) % d)
        self.gain = torch.nn.Parameter(torch.ones(d))

    def _matvec(self, theta_d: Tensor) -> Tensor:
        return super()._matvec(theta_d * self.gain.to(theta_d.dtype))

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        return super()._rmatvec(theta_D) * self.gain.to(theta_D.dtype)


class _NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class NoForwardMode(VBLoRA):
    """A learned projection that PyTorch differentiates backwards only."""

    name, caught_by = "no_forward_mode", {"gradcheck", "transforms"}

    def _top_k(self) -> tuple[Tensor, Tensor]:
        weights, index = super()._top_k()
        return _NoForwardMode.apply(weights), index

    def _matvec(self, theta_d: Tensor) -> Tensor:
        return super()._matvec(_NoForwardMode.apply(theta_d))


class DependsOnTheData(UniLoRA):
    """Its branch cannot be exported."""

    name, caught_by = "depends_on_the_data", {"exports", "compiles"}

    def _matvec(self, theta_d: Tensor) -> Tensor:
        return super()._matvec(theta_d) if theta_d.abs().sum() < 1e30 else theta_d.new_zeros(len(theta_d), self.D)


class MixedBatch(VeRA):
    """The batch is reversed on the way."""

    name, caught_by = "mixed_batch", {"batched_forward"}

    def _matvec(self, theta_d: Tensor) -> Tensor:
        theta_D = super()._matvec(theta_d)
        return theta_D.flip(0) if len(theta_D) == 6 else theta_D


MUTANTS: list[type[Projection]] = [c for c in list(globals().values()) if hasattr(c, "caught_by")]
