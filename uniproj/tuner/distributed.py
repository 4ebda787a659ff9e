"""Training over several processes with a sharded base: what is trained stays whole on each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from uniproj.errors import AdapterError
from uniproj.tuner.attached import tuner_of
from uniproj.tuner.model import UniProjModel


def shard_base(model: PeftModel, **options: Any) -> None:
    """Shard the frozen base over all processes with FSDP2, block by block; theta_d, P and heads stay whole on each.

    Their gradients (d numbers and the head) are averaged over the processes in each backward, as DDP does, so that
    optimiser states, checkpoints and adapters are those of one process. Call it once, after the adapter is attached; do
    not wrap the model in DDP. options: those of `torch.distributed.fsdp.fully_shard`.

    Raises AdapterError where no process group exists, for a model without a uniproj adapter, and for a quantised base,
    whose packed weights cannot be split.
    """
    tuner = tuner_of(model, "shard_base")
    if not dist.is_initialized():
        raise AdapterError("shard_base: a process group must exist, got none. Start with torchrun or accelerate.")
    base = tuner.model
    if packed := [name for name, p in base.named_parameters() if _is_packed(p)]:
        raise AdapterError(
            f"shard_base: the base must not be quantised, got packed weights such as {packed[0]}. Use DDP instead."
        )
    whole = _kept_whole(tuner)
    for parameter in whole:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_mean_over(dist.get_world_size()))
    for part in [*_blocks(base), base]:
        fully_shard(part, ignored_params=set(whole), **options)


def _is_packed(parameter: nn.Parameter) -> bool:
    """torchao's tensors say that they are floats."""
    return not parameter.is_floating_point() or type(parameter).__module__.startswith("torchao.")


def _kept_whole(tuner: UniProjModel) -> list[nn.Parameter]:
    """theta_d, the Parameters of P, and modules that are trained beside the adapter."""
    beside = [module for module in tuner.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    modules: Iterable[nn.Module] = [tuner.uniproj_theta_d, tuner.projections, *beside]
    return list(dict.fromkeys(p for module in modules for p in module.parameters()))


def _blocks(base: nn.Module) -> list[nn.Module]:
    """The layers that the architecture names as units; none where it names none."""
    names = set(getattr(base, "_no_split_modules", None) or ())
    return [module for module in base.modules() if type(module).__name__ in names]


def _mean_over(processes: int) -> Callable[[Tensor], None]:
    def average(parameter: Tensor) -> None:
        assert parameter.grad is not None
        # a sum of parts, since gloo has no ReduceOp.AVG
        dist.all_reduce(parameter.grad.div_(processes))

    return average
