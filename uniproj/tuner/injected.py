"""Adapters of a model without a PeftModel, as `inject_adapter_in_model` and Transformers' own methods add them.

PEFT drops the tuner there, so the model itself holds theta_d, P and identity, under the names that they have on the
tuner; its hooks keep the tuner.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from uniproj.errors import AdapterError

_TUNER = "_uniproj_tuner"
# of what is trained and what it belongs to, on the tuner or on the model
_HELD = ("uniproj_theta_d", "uniproj_projections", "uniproj_identity")


class Injected(nn.Module):
    """Such a model, its parts by the names that a PeftModel gives them, so keys of its tensors begin alike."""

    def __init__(self, tuner: nn.Module):
        super().__init__()
        self.base_model: Any = tuner
        self.peft_config: dict[str, Any] = tuner.peft_config  # type: ignore[assignment]


def tuner_on(model: Any) -> Any:
    """The tuner of the adapters that were injected into a model, or None."""
    return getattr(model, _TUNER, None)


def put_on(model: nn.Module, tuner: nn.Module) -> None:
    """Let a model find its tuner, which is no module of it.

    Raises AdapterError for a model that calls all of its children, those that hold the adapters included.
    """
    if isinstance(model, nn.Sequential):
        raise AdapterError(
            "inject_adapter_in_model: the model must be a module of a class of its own, which then holds theta_d, got "
            "nn.Sequential, which would call it as a layer. Use get_peft_model."
        )
    vars(model)[_TUNER] = tuner


def take_off(model: nn.Module) -> None:
    """Leave nothing of the adapters on a model whose layers were restored."""
    for name in _HELD:
        delattr(model, name)
    for name in (_TUNER, "peft_config", "_hf_peft_config_loaded"):
        vars(model).pop(name, None)
