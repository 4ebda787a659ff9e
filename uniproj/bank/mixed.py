"""Mixed batches: every row of a batch with a theta_d of its own, through one pass over the base model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from uniproj.bank.adapter import active_adapter, layers_of
from uniproj.errors import AdapterError
from uniproj.tuner import adapter_of
from uniproj.tuner.attached import tuner_of
from uniproj.tuner.merging import refuse_merged
from uniproj.tuner.theta import PerRow

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@contextmanager
def mixed(model: nn.Module, thetas: Tensor, rows: Any) -> Iterator[None]:
    """Within the block, row i of every batch uses thetas[rows[i]] in place of the theta_d of the active adapter.

    thetas (K, d) float; rows (n,) integers in [0, K), n the rows of the batch as the model sees it (times the beams of
    a beam search). The K vectors are projected together, once per forward in training and once in all without
    gradients; each layer is then one batched product with factors (n, rows, columns). A row of zeros is the base model
    where c = 0. With `thetas` a Parameter this trains K users at once on one frozen base: call backward within the
    block. Layers must see the batch as their first axis.

    Raises AdapterError for tensors of other shapes, several active adapters, or an adapter that is merged, disabled or
    an aLoRA; within the block, for a batch of another size and for a layer that gets tokens without a batch axis.
    """
    tuner = tuner_of(model, "mixed")
    name = active_adapter(tuner, "mixed")
    layers = layers_of(tuner, name)
    refuse_merged(layers, "mixed")
    if tokens := tuner.peft_config[name].alora_invocation_tokens:
        raise AdapterError(
            f"mixed: an adapter must act on every token, got alora_invocation_tokens = {tokens}, for which PEFT takes "
            "the tokens out of their rows. Call bank.select for each user."
        )
    if any(layer.disable_adapters for layer in layers):
        raise AdapterError("mixed: the adapter must be enabled, got disabled layers. Leave disable_adapter first.")
    source = tuner._sources[name]
    P, theta_d = adapter_of(tuner, name)
    d, device = P.d, theta_d.device
    if not isinstance(thetas, Tensor):
        raise AdapterError(
            f"mixed: thetas must be one tensor of shape (K, d) = (K, {d}), got a {type(thetas).__name__}. "
            "Pass torch.stack of the vectors, or bank.get_many(names)."
        )
    if thetas.ndim != 2 or thetas.shape[1] != d or not len(thetas) or not thetas.is_floating_point():
        raise AdapterError(
            f"mixed: thetas must be floats of shape (K, d) = (K, {d}), got {thetas.dtype} of shape "
            f"{tuple(thetas.shape)}. Stack one theta_d of this model's projection per user."
        )
    index = _indices(rows, len(thetas))
    with source.using(PerRow(thetas.to(device), index.to(device, torch.int64))):
        yield


def _indices(rows: Any, users: int) -> Tensor:
    """rows as a tensor (n,) of integers in [0, users)."""
    try:
        index = torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError):  # whatever is no array of numbers
        index = torch.empty(0)
    if index.ndim != 1 or not len(index) or index.dtype not in _INTEGERS or not 0 <= index.min() <= index.max() < users:
        raise AdapterError(
            f"mixed: rows must be integers in [0, K) = [0, {users}), one per row of the batch, got {rows!r:.80}. "
            "Name the row of thetas that each row of the batch uses."
        )
    return index
