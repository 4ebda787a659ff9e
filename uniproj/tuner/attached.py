"""An adapter of a model by its name: P and theta_d."""

from __future__ import annotations

from typing import NamedTuple, cast

from peft import PeftModel
from torch import nn

from uniproj.errors import AdapterError
from uniproj.projection import Projection
from uniproj.tuner.injected import tuner_on
from uniproj.tuner.model import UniProjModel


class Attached(NamedTuple):
    """One adapter of a model: its projection, and the Parameter (d,) that is trained."""

    P: Projection
    theta_d: nn.Parameter


def adapter_of(model: nn.Module, name: str = "default", where: str = "adapter_of") -> Attached:
    """P and theta_d of one adapter, the objects that the model itself uses.

    model: a PeftModel, the UniProjModel inside, or a model with injected adapters; where: the first word of an error.
    Raises AdapterError for any other model, and for a name that is no adapter's. A state dict loaded with assign=True
    replaces theta_d: ask again then.
    """
    tuner = tuner_of(model, where)
    if name not in tuner.projections:
        raise AdapterError(
            f"{where}: the model must hold a uniproj adapter {name!r}, got {sorted(tuner.projections)}. "
            "Pass the name of one of these."
        )
    return Attached(cast(Projection, tuner.projections[name]), tuner.uniproj_theta_d[name])


def tuner_of(model: nn.Module, where: str = "tuner_of") -> UniProjModel:
    """The UniProjModel of a PeftModel or of injected adapters, or the model itself.

    Raises AdapterError for any other model.
    """
    tuner = model.base_model if isinstance(model, PeftModel) else tuner_on(model) or model
    if not isinstance(tuner, UniProjModel):
        if isinstance(tuner, nn.Module) and any(isinstance(module, UniProjModel) for module in tuner.modules()):
            raise AdapterError(
                f"{where}: the model must be the PeftModel itself, got a {type(tuner).__name__} around it. "
                "Pass the PeftModel that it was made of."
            )
        raise AdapterError(
            f"{where}: the model must hold a uniproj adapter, got a {type(tuner).__name__}. "
            "Attach one with get_peft_model and a UniProjConfig."
        )
    return tuner
