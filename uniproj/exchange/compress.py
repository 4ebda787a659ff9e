"""Compression of a LoRA into one vector: the nearest theta_d of a projection, and how much is lost."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from uniproj.errors import AdapterError
from uniproj.exchange import bases
from uniproj.exchange.adapter import Adapter, LoRAAdapter, lora_fields
from uniproj.exchange.nearest import balanced, captured, captured_delta_W, gauge_note, least_squares
from uniproj.format.fields import Role, fields_of
from uniproj.format.places import places
from uniproj.registry import build, get
from uniproj.tuner.config import UniProjConfig
from uniproj.tuner.quantised import BaseWeights

IDENTITY = "lora"
# A theta_D in the image of P loses at most this share: the square of float32's rounding, over long sums.
_IN_IMAGE = 1e-10


def compress(
    adapter: LoRAAdapter,
    projection: str,
    d: int | None,
    seed: int,
    options: Mapping[str, Any],
    base: str | nn.Module | None,
    trust_remote_code: bool = False,
) -> tuple[Adapter, dict[str, Any]]:
    """A uniproj adapter whose theta_D is nearest to a LoRA's, and its quality.

    A theta_D in the image of P is kept as it is, to float32's rounding; any other is balanced first.

    base: the model that the adapter belongs to (or its name), for projections that are made of its weights; any other
    projection needs the shapes alone. trust_remote_code: whether Python code that comes with a model of this name may
    run. Raises ProjectionError or AdapterError where the projection refuses them.
    """
    if not isinstance(options, Mapping):
        raise AdapterError(
            f'compress: options must be an object such as {{"k": 2}}, got {options!r}. Name the hyperparameter.'
        )
    needed: dict[str, Any] = {}
    if get(projection).needs_base_weights:
        if base is None:
            raise AdapterError(
                f"compress: {projection} is made of the base weights, which a LoRA folder does not hold. Pass --base."
            )
        model = bases.load(base, adapter.config, True, trust_remote_code)
        needed["base_weights"] = BaseWeights(places(model, adapter.config))
    P = build(projection, layout=adapter.layout, d=d, seed=seed, **needed, **options)
    own, target = copy.deepcopy(P), adapter.theta_D.double()
    found = least_squares(own, target)
    unbalanced = captured(target, found.theta_D)
    if 1.0 - unbalanced <= _IN_IMAGE:  # such as what was exported from this P: another gauge would lead out of it
        P = own
    else:
        target = balanced(adapter.layout, target)
        found = least_squares(P, target)
    with torch.no_grad():
        reached = P(found.theta_d.float().double())  # as it will be read: theta_d in float32
    factor = captured(target, reached)
    fields = {name: value for name, value in lora_fields(adapter.config).items() if name not in fields_of(Role.START)}
    config = UniProjConfig(
        projection=projection,
        d=d,
        projection_seed=seed,
        projection_kwargs=dict(options),
        **fields,
    )
    return Adapter(P, found.theta_d.float(), config, P.layout, adapter.scales, adapter.other), {
        "projection": projection,
        "method": found.method,
        "D": P.D,
        "d": P.d,
        "trained": P.trained,
        "random": P.d / P.D,
        "captured_factor": factor,
        "captured_as_trained": unbalanced,
        "captured_delta_W": captured_delta_W(adapter.layout, adapter.scales, target, reached),
        "note": gauge_note(factor, unbalanced),
    }
