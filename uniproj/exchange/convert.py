"""Live adapters of PEFT's own methods as a projection and its theta_d, and the other way round."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor

from uniproj.errors import AdapterError
from uniproj.exchange import registry
from uniproj.exchange.formats._peft import PeftMethod
from uniproj.projection import Projection


def from_peft(
    model: PeftModel, adapter_name: str = "default", dtype: torch.dtype = torch.float64
) -> tuple[Projection, Tensor]:
    """The projection of a PEFT adapter, with PEFT's own frozen tensors, and its theta_d (d,) in `dtype`.

    PEFT's scale (alpha / r of LORA, 1 elsewhere) stays outside theta_D: delta W = s B A. Learned Parameters (VB-LoRA's
    logits) are held in `dtype`, at least float32. The projection's `rebuild` draws uniproj's numbers, not PEFT's,
    except for Uni-LoRA's indices. Nothing is shared with the model.

    Raises AdapterError for an adapter of another PEFT type, with tied embeddings or, except of LORA, on layers that are
    not linear, and ProjectionError where the method refuses the sizes (UNILORA with d > D).
    """
    return _method("from_peft", model, adapter_name).take(model, adapter_name, dtype)


def to_peft(projection: Projection, theta_d: Tensor, model: PeftModel, adapter_name: str = "default") -> None:
    """Write theta_d (d,), learned Parameters and frozen tensors into a PEFT adapter, in place and in PEFT's dtypes.

    UNILORA takes every partition: uniproj's own Uni-LoRA and its ablations too. Raises AdapterError, before anything is
    written, for another PEFT type, projection, layout or d, for a merged adapter, and for frozen tensors that PEFT
    would redraw on loading or that other adapters share.
    """
    _method("to_peft", model, adapter_name).give(projection, theta_d, model, adapter_name)


def _method(who: str, model: PeftModel, adapter_name: str) -> PeftMethod:
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise AdapterError(
            f"{who}: the model must have an adapter {adapter_name!r}, got {sorted(configs)}. Pass adapter_name=."
        )
    peft_type = configs[adapter_name].peft_type
    kind = str(getattr(peft_type, "value", peft_type))
    methods = {method.kind: method for method in registry.every() if isinstance(method, PeftMethod)}
    if kind not in methods:
        raise AdapterError(
            f"{who}: adapter {adapter_name!r} must be of a PEFT type among {', '.join(methods)}, got {kind}. "
            "Other types have no projection that gives the same A and B."
        )
    return methods[kind]
