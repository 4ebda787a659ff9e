"""Gradient checkpointing: the kinds that work with one theta_D, and what a checkpointed region must not count."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from uniproj.errors import AdapterError


def several_processes() -> bool:
    """Whether a process group of more than one process exists."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def uncounted() -> torch.autograd.graph.saved_tensors_hooks:
    """Within the block, tensors saved for backward are not counted by `torch.utils.checkpoint`.

    It raises an error if a checkpointed region saves fewer tensors when it runs again than in its forward, as happens
    where the forward projects theta_D and the second run finds it ready.
    """
    return torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)


def refuse_reentrant(model: nn.Module) -> None:
    """Raise AdapterError for reentrant checkpointing, which runs a backward through theta_D once per segment.

    DDP would average the gradient on theta_d after the first of them; and a mixed batch is known to its own thread
    alone, while the backward may run its segments in another.
    """
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and getattr(checkpoint, "keywords", {}).get(
            "use_reentrant"
        ):
            raise AdapterError(
                "gradient checkpointing: `mixed` and training over several processes need the non-reentrant kind, "
                "got use_reentrant=True. "
                'Pass gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
