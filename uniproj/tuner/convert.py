"""Weights to and from PEFT's own methods: LORA, UNILORA, VERA, VBLORA, TINYLORA.

Each method is one list of pairs (a tensor of PEFT's, our view of the same numbers). Both directions copy along
that list, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from uniproj.errors import AdapterError
from uniproj.layout import LoRALayout
from uniproj.projection import Projection
from uniproj.projections._partition import Partition
from uniproj.projections.lora import LoRA
from uniproj.projections.tinylora import TinyLoRA
from uniproj.projections.unilora import UniLoRA
from uniproj.projections.vblora import VBLoRA
from uniproj.projections.vera import VeRA
from uniproj.tuner.quantised import BaseWeights

_EXACT = 1e-10
_FLOAT32 = 1e-6  # frozen numbers this close are the same draw at float32 precision


@dataclass(frozen=True)
class _Pair:
    """`fixed`: why PEFT's tensor may not change, or nothing."""

    where: str
    theirs: Tensor
    ours: Tensor
    fixed: str = ""


@dataclass(frozen=True)
class _Adapter:
    """One adapter of a PEFT model; `layers` by name in the base model, in PEFT's order of registration."""

    name: str
    kind: str
    config: Any
    layers: dict[str, Any]
    layout: LoRALayout

    def tensor(self, module: str, attribute: str) -> Any:
        return getattr(self.layers[module], attribute)[self.name]

    def shared(self, attribute: str) -> Any:
        return self.tensor(next(iter(self.layers)), attribute)

    def fixed_without(self, flag: str) -> str:
        return "" if getattr(self.config, flag) else f"PEFT redraws it on loading unless the config has {flag}=True"


@torch.no_grad()
def from_peft(
    model: PeftModel, adapter_name: str = "default", dtype: torch.dtype = torch.float64
) -> tuple[Projection, Tensor]:
    """The projection of a PEFT adapter, with PEFT's own frozen tensors, and its theta_d (d,) in `dtype`.

    PEFT's scale (alpha / r of LORA, 1 elsewhere) stays outside theta_D: delta W = s B A. Learned Parameters (VB-LoRA's
    logits) are held in `dtype`, at least float32. The projection's `rebuild` draws uniproj's numbers, not PEFT's,
    except for Uni-LoRA's indices. Nothing is shared with the model.

    Raises AdapterError for an adapter of another PEFT type or on layers that are not linear, and ProjectionError
    where the method refuses the sizes (UNILORA with d > D).
    """
    adapter = _open("from_peft", model, adapter_name)
    _, build, pair_up = _METHODS[adapter.kind]
    device = next(next(iter(adapter.layers.values())).parameters()).device
    projection = build(adapter).to(device, torch.promote_types(dtype, torch.float32))
    theta_d = torch.zeros(projection.d, dtype=dtype, device=device)
    pairs = list(pair_up(adapter, projection, theta_d))
    _check_shapes("from_peft", pairs)
    for pair in pairs:
        pair.ours.copy_(pair.theirs)
    return projection, theta_d


@torch.no_grad()
def to_peft(projection: Projection, theta_d: Tensor, model: PeftModel, adapter_name: str = "default") -> None:
    """Write theta_d (d,), learned Parameters and frozen tensors into a PEFT adapter, in place and in PEFT's dtypes.

    UNILORA takes every partition: uniproj's own Uni-LoRA and its ablations too. Raises AdapterError, before anything is
    written, for another PEFT type, projection, layout or d, for a merged adapter, and for frozen tensors that PEFT
    would redraw on loading or that other adapters share.
    """
    adapter = _open("to_peft", model, adapter_name)
    accepts, _, pair_up = _METHODS[adapter.kind]
    if not isinstance(projection, accepts):
        raise AdapterError(
            f"to_peft: an adapter of PEFT type {adapter.kind} must get a {accepts.__name__} projection, "
            f"got {projection.name!r}. Use the PEFT type of that method, or train it with UniProjConfig."
        )
    _check_layout(projection.layout, adapter.layout)
    if theta_d.shape != (projection.d,):
        raise AdapterError(
            f"to_peft: theta_d must have shape (d,) = ({projection.d},), got {tuple(theta_d.shape)}. "
            "Write one adapter at a time."
        )
    if merged := [name for name, layer in adapter.layers.items() if adapter_name in layer.merged_adapters]:
        raise AdapterError(
            f"to_peft: {merged[0]} must not have {adapter_name!r} merged, got {len(merged)} modules that have. "
            "Call unmerge_adapter() first, or the base weight keeps the old update."
        )
    pairs = list(pair_up(adapter, projection, theta_d.contiguous()))
    _check_shapes("to_peft", pairs)
    for pair in (pair for pair in pairs if pair.fixed):
        ours, theirs = pair.ours.to(pair.theirs.device).double(), pair.theirs.double()
        if not torch.allclose(theirs, ours, rtol=_FLOAT32, atol=0.0):
            raise AdapterError(
                f"to_peft: {pair.where} must already equal the projection's, as {pair.fixed}, got a difference of "
                f"{(theirs - ours).abs().max():.3g}. Change that setting, or take the projection from this model."
            )
    for pair in pairs:
        pair.theirs.copy_(pair.ours)


def _open(who: str, model: PeftModel, adapter_name: str) -> _Adapter:
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise AdapterError(
            f"{who}: the model must have an adapter {adapter_name!r}, got {sorted(configs)}. Pass adapter_name=."
        )
    peft_type = configs[adapter_name].peft_type
    kind = str(getattr(peft_type, "value", peft_type))
    if kind not in _METHODS:
        raise AdapterError(
            f"{who}: adapter {adapter_name!r} must be of a PEFT type among {', '.join(_METHODS)}, got {kind}. "
            "Other types have no projection that gives the same A and B."
        )
    layers = {
        name: layer
        for name, layer in model.base_model.model.named_modules()
        if isinstance(layer, BaseTunerLayer) and adapter_name in getattr(layer, "r", {})
    }
    for name, layer in layers.items():
        if found := _not_plain(layer, adapter_name):
            raise AdapterError(
                f"{who}: {name} must be a linear layer whose update is s B A, got {found}. "
                "Leave it out of target_modules, or keep this adapter in PEFT."
            )
    layout = LoRALayout.from_shapes(
        {name: (layer.out_features, layer.in_features) for name, layer in layers.items()},
        {name: layer.r[adapter_name] for name, layer in layers.items()},
    )
    return _Adapter(adapter_name, kind, configs[adapter_name], layers, layout)


def _not_plain(layer: Any, adapter_name: str) -> str:
    """What makes a layer's update something else than s B A, or nothing."""
    base = layer.get_base_layer()
    if isinstance(base, (nn.Embedding, nn.modules.conv._ConvNd, nn.MultiheadAttention)):
        return type(base).__name__
    if hasattr(layer, "parameter_name"):
        return f"target_parameters {layer.parameter_name!r}"
    if adapter_name in getattr(layer, "lora_variant", {}):
        return type(layer.lora_variant[adapter_name]).__name__
    return "lora_bias=True" if getattr(layer, "lora_bias", {}).get(adapter_name) else ""


def _check_layout(wanted: LoRALayout, found: LoRALayout) -> None:
    for mine, theirs in zip_longest(wanted.blocks, found.blocks):
        if mine != theirs:
            want, got = (f"{b.module}.{b.factor} {b.shape}" if b else "nothing more" for b in (mine, theirs))
            raise AdapterError(
                f"to_peft: the adapter must have {want} as in the projection's layout (D = {wanted.D}), got {got} "
                f"(D = {found.D}). Use the same base model, target_modules and ranks."
            )


def _check_shapes(who: str, pairs: list[_Pair]) -> None:
    for pair in pairs:
        if pair.theirs.shape != pair.ours.shape:
            raise AdapterError(
                f"{who}: {pair.where} must have the projection's shape {tuple(pair.ours.shape)}, "
                f"got {tuple(pair.theirs.shape)}. Use the same hyperparameters on both sides."
            )


def _lora_pairs(adapter: _Adapter, P: LoRA, theta_d: Tensor) -> Iterator[_Pair]:
    for block, ours in zip(P.layout.blocks, P.layout.split(theta_d), strict=True):
        factor = f"lora_{block.factor}"
        yield _Pair(f"{block.module}.{factor}", adapter.tensor(block.module, factor).weight, ours)


def _build_unilora(adapter: _Adapter) -> UniLoRA:
    def per_row(what: str) -> Tensor:
        return adapter.layout.flatten(
            {(b.module, b.factor): adapter.tensor(b.module, f"{what}_{b.factor}").cpu() for b in adapter.layout.blocks}
        )

    config = adapter.config
    P = UniLoRA(
        adapter.layout, config.theta_d_length, config.proj_seed, assignment="peft", module_order=list(adapter.layers)
    )
    index, scales = per_row("unilora_indices"), per_row("unilora_scales").double()
    if index.min() < 0 or index.max() >= P.d:
        raise AdapterError(f"from_peft: indices must lie in [0, {P.d}), got others. Copy or download the file again.")
    redealt = not torch.equal(index, P.index.long())
    scale = torch.zeros_like(P.scale).index_put_((index,), scales)
    odd = (scale[index] != scales).nonzero().flatten()
    if len(odd):
        row = int(odd[0])
        module = adapter.layout.modules[int(adapter.layout.module_index()[row])]
        raise AdapterError(
            f"from_peft: {module} must scale coordinate {int(index[row])} as every other row does, by "
            f"{scale[index[row]]:.6g}, got {scales[row]:.6g}. Its scales belong to other indices: regenerate both."
        )
    P.scale.copy_(scale)
    # PEFT keeps scales in the base weight's dtype, so its columns are unit vectors only to that precision
    if (torch.bincount(index, minlength=P.d) * scale**2 - 1.0).abs().max() > _EXACT:
        P.claims = P.claims - {"isometric"}
    if redealt:
        P.claims = P.claims - {"uniform", "global_sharing"}
    return P


def _unilora_pairs(adapter: _Adapter, P: Partition, theta_d: Tensor) -> Iterator[_Pair]:
    yield _Pair("unilora_theta_d", adapter.shared("unilora_theta_d"), theta_d)
    fixed = adapter.fixed_without("save_indices")
    # one scale per coordinate here, one per row there: reading fills a throw-away copy, as `build` has read them
    index, scales = P.layout.split(P.index), P.layout.split(P.scale[P.index.long()])
    for b, i, s in zip(P.layout.blocks, index, scales, strict=True):
        for name, ours in ((f"unilora_indices_{b.factor}", i), (f"unilora_scales_{b.factor}", s)):
            yield _Pair(f"{b.module}.{name}", adapter.tensor(b.module, name), ours, fixed)


def _vera_pairs(adapter: _Adapter, P: VeRA, theta_d: Tensor) -> Iterator[_Pair]:
    fixed = adapter.fixed_without("save_projection")
    sharing = sorted(next(iter(adapter.layers.values())).vera_A)
    if len(sharing) > 1:
        fixed = f"adapters {sharing} share it"
    parts = theta_d.split([side.numbers for side in P.sides])
    for side, part, name in zip(P.sides, parts, ("vera_lambda_b", "vera_lambda_d"), strict=True):
        for block, ours in zip(side.blocks, part.split(side.scaler_sizes), strict=True):
            yield _Pair(f"{block.module}.{name}", adapter.tensor(block.module, name), ours)
    (out, _), (_, in_) = P.sides[0].sizes[0], P.sides[1].sizes[0]
    yield _Pair("vera_B", adapter.shared("vera_B")[:out], P.B.view(out, -1), fixed)
    yield _Pair("vera_A", adapter.shared("vera_A")[:, :in_], P.A.view(-1, in_), fixed)


def _build_vblora(adapter: _Adapter) -> VBLoRA:
    h, b = adapter.shared("vblora_vector_bank").shape
    return VBLoRA(adapter.layout, num_vectors=h, vector_length=b, topk=adapter.shared("topk"))


def _vblora_pairs(adapter: _Adapter, P: VBLoRA, theta_d: Tensor) -> Iterator[_Pair]:
    yield _Pair("vblora_vector_bank", adapter.shared("vblora_vector_bank"), theta_d.view(P.h, P.b))
    yield _Pair("topk", torch.tensor(adapter.shared("topk")), torch.tensor(P.topk), "PEFT's config decides it")
    parts = P.logits.detach().split([block.numel // P.b for block in P.layout.blocks])
    for block, ours in zip(P.layout.blocks, parts, strict=True):
        pieces = (block.shape[0] // P.b, block.shape[1]) if block.factor == "B" else (block.shape[0], -1)
        name = f"vblora_logits_{block.factor}"
        yield _Pair(f"{block.module}.{name}", adapter.tensor(block.module, name), ours.view(*pieces, P.h))


def _build_tinylora(adapter: _Adapter) -> TinyLoRA:
    config = adapter.config
    weights = BaseWeights({name: layer.get_base_layer() for name, layer in adapter.layers.items()})
    options = {"u": adapter.shared("u"), "weight_tying": config.weight_tying}
    P = TinyLoRA(adapter.layout, weights, config.projection_seed, **options)
    P.group = [int(_tinylora_key(adapter, module)) for module in adapter.layout.modules]
    for i in range(len(P.ranks)):
        setattr(P, f"P_{i}", P.constants()[f"P_{i}"].double())
    return P


def _tinylora_key(adapter: _Adapter, module: str) -> str:
    """The name of a module's numbers among those that modules share."""
    if hasattr(adapter.layers[module], "_tinylora_v_key"):
        return str(adapter.tensor(module, "_tinylora_v_key"))
    used = adapter.tensor(module, "_tinylora_v_ref")  # PEFT 0.21.0 keeps the Parameter in the place of its name
    return next(key for key, v in adapter.tensor(module, "tinylora_v").items() if v is used)


def _tinylora_pairs(adapter: _Adapter, P: TinyLoRA, theta_d: Tensor) -> Iterator[_Pair]:
    keys: dict[int, str] = {}
    B, A = P.frozen("B"), P.frozen("A")
    for i, (module, group) in enumerate(zip(P.layout.modules, P.group, strict=True)):
        key = _tinylora_key(adapter, module)
        if keys.setdefault(group, key) != key or list(keys.values()).count(key) > 1:
            raise AdapterError(
                f"to_peft: {module} must share its numbers with the modules of group {group}, as in the projection, "
                f"got PEFT's group {key}. PEFT ties by order of registration: take the projection from this model."
            )
        v = adapter.tensor(module, "tinylora_v")[key]
        yield _Pair(f"{module}.tinylora_v", v, theta_d.view(-1, P.u)[group])
        drawn = adapter.fixed_without("save_projection")
        for letter, ours, fixed in (("B", B[i], ""), ("A", A[i], ""), ("P", P.constants()[f"P_{i}"], drawn)):
            name = f"tinylora_{letter}"
            yield _Pair(f"{module}.{name}", adapter.tensor(module, name), ours, fixed)


_METHODS: dict[str, tuple[type[Projection], Callable[[_Adapter], Projection], Callable[..., Iterator[_Pair]]]] = {
    "LORA": (LoRA, lambda adapter: LoRA(adapter.layout), _lora_pairs),
    "UNILORA": (Partition, _build_unilora, _unilora_pairs),
    "VERA": (VeRA, lambda adapter: VeRA(adapter.layout, adapter.config.projection_prng_key), _vera_pairs),
    "VBLORA": (VBLoRA, _build_vblora, _vblora_pairs),
    "TINYLORA": (TinyLoRA, _build_tinylora, _tinylora_pairs),
}
