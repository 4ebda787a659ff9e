"""PEFT's TINYLORA, whose P is made of the base model's weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from peft import TinyLoraConfig
from torch import Tensor

from uniproj.errors import AdapterError
from uniproj.exchange.formats._peft import Attached, Candidate, Pair, PeftMethod
from uniproj.exchange.registry import register
from uniproj.format.places import places_of
from uniproj.projections.tinylora import TinyLoRA
from uniproj.tuner.config import UniProjConfig
from uniproj.tuner.quantised import BaseWeights


@register("tinylora")
class TinyLoRAFormat(PeftMethod):
    """Which modules share numbers follows from the base model's order of registration."""

    kind, config, accepts = "TINYLORA", TinyLoraConfig, TinyLoRA
    needs_order = needs_weights = True

    def build(self, theirs: Attached) -> TinyLoRA:
        config = theirs.config
        places = [places_of(name, layer.get_base_layer()) for name, layer in theirs.layers.items()]
        weights = BaseWeights({name: place for each in places for name, place in each.items()})
        options = {"u": theirs.shared("u"), "weight_tying": config.weight_tying}
        P = TinyLoRA(theirs.layout, weights, config.projection_seed, **options)
        P.drawn = P.drawn.double()
        P.share([int(_key(theirs, module)) for module in theirs.layout.modules])
        return P

    def pairs(self, theirs: Attached, P: TinyLoRA, theta_d: Tensor) -> Iterator[Pair]:
        keys: dict[int, str] = {}
        B, A, random = P.frozen("B"), P.frozen("A"), P.random()
        for i, (module, group) in enumerate(zip(P.layout.modules, P.group, strict=True)):
            key = _key(theirs, module)
            if keys.setdefault(group, key) != key or list(keys.values()).count(key) > 1:
                raise AdapterError(
                    f"to_peft: {module} must share its numbers with the modules of group {group}, as in the "
                    f"projection, got PEFT's group {key}. PEFT ties by order of registration: take the projection from "
                    "this model."
                )
            v = theirs.tensor(module, "tinylora_v")[key]
            yield Pair(f"{module}.tinylora_v", v, theta_d.view(-1, P.u)[group])
            drawn = theirs.fixed_without("save_projection")
            for letter, ours, fixed in (("B", B[i], ""), ("A", A[i], ""), ("P", random[i], drawn)):
                name = f"tinylora_{letter}"
                yield Pair(f"{module}.{name}", theirs.tensor(module, name), ours, fixed)

    def fields(self, P: TinyLoRA, config: UniProjConfig) -> dict[str, Any]:
        """The seed, and how modules share numbers."""
        return {"u": P.u, "weight_tying": config.projection_kwargs.get("weight_tying", 0.0), "projection_seed": P.seed}

    def candidates(self, P: TinyLoRA, config: Any, order: tuple[str, ...]) -> Iterator[Candidate]:
        """Ours, if uniproj made the factors: the signs and the rounding of PEFT's own SVD follow from no seed."""
        yield "tinylora", config.projection_seed, {"u": config.u, "weight_tying": config.weight_tying}

    def moved(self, theirs: TinyLoRA, ours: Any, theta_d: Tensor) -> Tensor | None:
        """theta_d with its groups of u numbers in our order, or None where other modules share them."""
        pairs = set(zip(ours.group, theirs.group, strict=True))
        order = dict(pairs)
        if len(order) < len(pairs) or len(set(order.values())) < len(order):
            return None
        grouped = copy.copy(ours)
        grouped.share(theirs.group)
        if super().moved(theirs, grouped, theta_d) is None:
            return None
        return theta_d.view(-1, ours.u)[[order[group] for group in sorted(order)]].flatten()


def _key(theirs: Attached, module: str) -> str:
    """The name of a module's numbers among those that modules share."""
    if hasattr(theirs.layers[module], "_tinylora_v_key"):
        return str(theirs.tensor(module, "_tinylora_v_key"))
    used = theirs.tensor(module, "_tinylora_v_ref")  # PEFT 0.21.0 keeps the Parameter in the place of its name
    return next(key for key, v in theirs.tensor(module, "tinylora_v").items() if v is used)
