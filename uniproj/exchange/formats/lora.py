"""Export and import of PEFT's LORA folders, which need the base model only where its parameters are adapted."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import Tensor, nn

from uniproj.errors import AdapterError
from uniproj.exchange import bases, peft_folder
from uniproj.exchange.adapter import Adapter, LoRAAdapter, lora_fields, scales
from uniproj.exchange.formats._peft import Attached, Pair, PeftMethod, is_parameter, wraps
from uniproj.exchange.registry import register
from uniproj.format.fields import Role, used
from uniproj.format.heads import entitled
from uniproj.format.patterns import of_sites, targets
from uniproj.format.places import Place, places
from uniproj.layout import LoRALayout, Site
from uniproj.projections.lora import LoRA
from uniproj.tuner.layers import adapted, factors_of

_FACTOR = re.compile(
    r"base_model\.model\.(?P<layer>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?(embedding)|\.weight)"
)
# of an attention, all of which PEFT adapts by a layer around it
_WITHIN = re.compile(r"\.base_layer(?=\.out_proj$)")
# Values of init_lora_weights for which PEFT changes the base weights too, at every load.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@register("lora")
class LoRAFormat(PeftMethod):
    """A folder holds every A and B, so any projection can be written, on every kind of layer."""

    kind, config, accepts = "LORA", LoraConfig, LoRA
    only_linear = False
    takes_rank = True

    def layers(self, model: PeftModel, adapter_name: str) -> dict[str, Any]:
        """Those of every kind."""
        return dict(adapted(model.base_model.model, adapter_name))

    def build(self, theirs: Attached) -> LoRA:
        """The identity."""
        return LoRA(theirs.layout)

    def pairs(self, theirs: Attached, P: LoRA, theta_d: Tensor) -> Iterator[Pair]:
        """Every A and every B."""
        for slot, ours in enumerate(P.layout.split_sites(theta_d)):
            site, is_A = P.layout.sites[slot // 2], bool(slot % 2)
            factor = factors_of(theirs.layers[site.name])[is_A][theirs.name]
            tensor = factor if isinstance(factor, Tensor) else factor.weight
            where = f"{site.name}.lora_{'BA'[is_A]}"
            if is_A and site.axes:  # axis by axis, as its channels may lie last in memory
                tensor = tensor if site.count is None else tensor.unflatten(0, (site.count, -1))
                yield Pair(where, tensor, ours.unflatten(-1, site.axes))
            else:
                yield Pair(where, _as_ours(site, is_A, tensor), ours)

    def write(self, adapter: Adapter, folder: Path, rank: int | None) -> None:
        """See `write` below."""
        write(adapter.lora(), folder, rank)

    def read(self, folder: Path, base: str | nn.Module | None, trust_remote_code: bool) -> LoRAAdapter:
        """See `read` below."""
        return read(folder, base, trust_remote_code)


def read(folder: Path, base: str | nn.Module | None = None, trust_remote_code: bool = False) -> LoRAAdapter:
    """The adapter in a folder of PEFT's LORA, theta_D in float64.

    base: the base model or its name, for `target_parameters`, whose names and sizes it alone tells; trust_remote_code:
    see `bases.load`. Raises AdapterError for a missing folder, another PEFT type, DoRA and other variants, tied
    embeddings, PiSSA and other starts for which PEFT changes the base weights, an alpha that is no number, a factor
    without its pair, numbers that are not finite, and tensors that the configuration or the base does not account for.
    """
    config = peft_folder.read_config(folder, "LORA")
    if changed := used(vars(config), Role.VARIANT):
        raise AdapterError(f"{folder}: the update must be s B A, got {', '.join(changed)}. Take a plain LoRA.")
    if config.ensure_weight_tying:
        raise AdapterError(
            f"{folder}: every module must have an A and a B of its own, got ensure_weight_tying=True, where the output "
            "embedding has the input's. Load it with PEFT's PeftModel.from_pretrained."
        )
    if str(config.init_lora_weights).startswith(_CHANGES_BASE):
        raise AdapterError(
            f"{folder}: the base weights must be those that were pretrained, got init_lora_weights = "
            f"{config.init_lora_weights!r}, for which PEFT changes them. Save it anew by PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it."
        )
    tensors = peft_folder.read_tensors(folder)
    found = {name: match for name in tensors if (match := _FACTOR.fullmatch(name))}
    if odd := [name for name in found if not tensors[name].is_floating_point()]:
        raise AdapterError(
            f"{folder}: {odd[0]} must hold real numbers, got {tensors[odd[0]].dtype}. Save it as float32."
        )
    of_base: dict[str, Place] = {}
    if config.target_parameters:
        if base is None:
            raise AdapterError(
                f"{folder}: which factors belong to which of target_parameters the base model alone tells. Pass --base."
            )
        of_base = places(bases.load(base, config, False, trust_remote_code), config)
    names = list(of_base) or sorted({_WITHIN.sub("", match["layer"]) for match in found.values()})
    layers = {layer: name for name, layer in _layers(config, names, names).items()}
    factors = {(layers.get(m["layer"], m[0]), m["factor"]): tensors[key].double() for key, m in found.items()}
    of_rows = {layers.get(match["layer"]) for match in found.values() if match["embedding"]}
    odd = [key for key in tensors if "lora_" in key and (key not in found or found[key]["layer"] not in layers)]
    if odd or not found:
        raise AdapterError(
            f"{folder}: every factor must belong to a layer of the base model, got {odd[:1] or 'none'}. Leave it out."
        )
    sites = []
    for name in names:
        B, A = (factors.get((name, factor)) for factor in "BA")
        count = of_base[name].sizes[2:] if is_parameter(config, name) else ()
        site = None if B is None or A is None else _site(name, B, A, name in of_rows, *count)
        if site is None:
            raise AdapterError(
                f"{folder}: {name} must have an A (r, in) and a B (out, r), or those of an embedding, a convolution or "
                f"experts, got {[None if x is None else tuple(x.shape) for x in (B, A)]}. The file is truncated."
            )
        sites.append(site)
    layout = LoRALayout.of_sites(sites)
    _warn_of_attentions("import", layout)
    ranks = of_sites("rank_pattern", config.rank_pattern, names, config.r)
    for site in layout.sites:
        if ranks[site.name] != site.rank:
            raise AdapterError(
                f"{folder}: the factors of {site.name} must have the rank of the configuration, {ranks[site.name]!r}, "
                f"got {site.rank}. Correct r or rank_pattern."
            )
    theta_D = torch.empty(layout.D, dtype=torch.float64)
    for slot, ours in enumerate(layout.split_sites(theta_D)):
        site, is_A = layout.sites[slot // 2], bool(slot % 2)
        ours.copy_(_as_ours(site, is_A, factors[site.name, "BA"[is_A]]))
    other = {name: tensor for name, tensor in tensors.items() if name not in found}
    other = entitled(other, config.to_dict(), names, str(folder))
    return LoRAAdapter(layout, theta_D, scales(config, layout), config, other)  # type: ignore[arg-type]


def write(adapter: LoRAAdapter, folder: Path, rank: int | None = None) -> None:
    """Write a folder of PEFT's LORA in float32, site by site: only theta_D is held in memory.

    Without `rank`, A and B are the numbers of theta_D, at their own ranks. With it, every module is padded to this rank
    by rows of A and columns of B that are 0, and the configuration has one rank and one integer alpha; where modules
    differ in s, or alpha would be no integer, the rest of s is multiplied into B, which is rounded once.

    Raises AdapterError for a rank below that of a module, or that a convolution cannot part among its groups, for
    several parameters of one module whose order is unknown, for tied embeddings with patterns, and where the disk
    refuses; what was there before stays.
    """
    old = adapter.layout.sites
    for site in old:
        groups = site.rank // site.r
        if rank is not None and (rank < site.rank or rank % groups):
            raise AdapterError(
                f"export: rank must be at least that of every module, {max(s.rank for s in old)}, got {rank}. Raise it."
                if rank < site.rank
                else f"export: rank must be a multiple of the {groups} groups of {site.name}, got {rank}. Change it."
            )
    own = adapter.config
    if rank is None and own.ensure_weight_tying and (own.rank_pattern or own.alpha_pattern):
        raise AdapterError(
            "export: of a tied output embedding PEFT takes the rank and alpha that patterns give to its own name, "
            f"uniproj those of the input embedding, got {own.rank_pattern or own.alpha_pattern}. Pass --rank, which "
            "needs no patterns."
        )
    embeddings = [site.name for site in old if site.axes == ()] if own.ensure_weight_tying else []
    if embeddings and {name.rpartition(".")[2] for name in embeddings}.isdisjoint(EMBEDDING_LAYER_NAMES):
        raise AdapterError(
            f"export: PEFT ties output embeddings to input embeddings called {EMBEDDING_LAYER_NAMES[0]} alone, and no "
            f"others, got {embeddings[0]}. Train an adapter without ensure_weight_tying to export it."
        )
    sites = [site if rank is None else replace(site, r=rank // (site.rank // site.r)) for site in old]
    _warn_of_attentions("export", adapter.layout)
    config = _config(adapter, rank)
    written = scales(config, adapter.layout, rank)
    layers = _layers(config, [site.name for site in old], _in_order(adapter))
    index: dict[str, tuple[torch.dtype, Sequence[int]]] = {
        f"base_model.model.{layers[site.name]}.{_tensor_name(site, is_A)}": (torch.float32, _shape(site, is_A))
        for site in sites
        for is_A in (False, True)
    }
    index |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in adapter.other.items()}

    def tensors() -> Iterator[Tensor]:
        for slot, factor in enumerate(adapter.layout.split_sites(adapter.theta_D)):
            site, is_A = sites[slot // 2], bool(slot % 2)
            rest = adapter.scales[site.name] / written[site.name]
            if not is_A and rest != 1.0:
                factor = factor.double() * rest
            theirs = torch.zeros(_shape(site, is_A))
            ours = _as_ours(site, is_A, theirs)
            ours[..., : factor.shape[-2], : factor.shape[-1]] = factor
            yield theirs
        yield from adapter.other.values()

    peft_folder.write(folder, config.to_dict(), index, tensors())


def _warn_of_attentions(what: str, layout: LoRALayout) -> None:
    """Of nn.MultiheadAttention, whose output projection has s B A twice in PEFT 0.21 (docs/design.md)."""
    names = dict.fromkeys(site.name for site in layout.sites)
    if name := next((name for name in names if f"{name}.out_proj" in names), None):
        warnings.warn(
            f"{what}: PEFT 0.21 adds the update of an attention's output projection twice, uniproj once, so {name} "
            "gives other outputs there.",
            stacklevel=3,
        )


def _config(adapter: LoRAAdapter, rank: int | None) -> LoraConfig:
    fields = lora_fields(adapter.config) | {"inference_mode": True}
    names = [site.name for site in adapter.layout.sites]
    # which PEFT adapts with their attention, and would once more by a name of their own
    parts = {f"{name}.out_proj" for name in names}.intersection(targets(adapter.config, names)[0])
    if parts and isinstance(excluded := fields["exclude_modules"] or [], str):
        fields["exclude_modules"] = "|".join([excluded, *map(re.escape, sorted(parts))])
    elif parts:
        fields["exclude_modules"] = sorted({*excluded, *parts})
    if rank is not None:
        first = next(iter(adapter.scales.values()))
        fields |= {"r": rank, "lora_alpha": max(1, round(first * rank))}
        fields |= {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    return LoraConfig(**fields)


def _in_order(adapter: LoRAAdapter) -> list[str] | None:
    """The sites in the base model's order of registration, where it is known."""
    if adapter.order is None:
        return None
    position = {module: i for i, module in enumerate(adapter.order)}
    return [site.name for site in sorted(adapter.layout.sites, key=lambda site: position[site.modules[0]])]


def _layers(config: LoraConfig, sites: Sequence[str], order: Sequence[str] | None) -> dict[str, str]:
    """{site: PEFT's name of the layer that adapts it}; order: the sites in the order of registration, or None.

    Of several parameters of one module the first has the innermost layer. Raises AdapterError for these without an
    order.
    """
    around, found = wraps(config, sites), {}
    left = Counter(around)
    for site in order or sites:
        parts = (site.rpartition(".")[0] if is_parameter(config, site) else site).split(".")
        inside: list[str] = []
        for i, part in enumerate(parts):
            inside += ["base_layer"] * around.get(".".join(parts[:i]), 0) + [part]
        if is_parameter(config, site):
            module = ".".join(parts)
            if order is None and around[module] > 1:
                raise AdapterError(
                    f"export: in which order {module} has its parameters, by which PEFT names their layers, the base "
                    "model alone tells. Pass --base."
                )
            left[module] -= 1
            inside += ["base_layer"] * left[module]
        found[site] = ".".join(inside)
    return found


def _tensor_name(site: Site, is_A: bool) -> str:
    return f"lora_embedding_{'BA'[is_A]}" if site.axes == () else f"lora_{'BA'[is_A]}.weight"


def _site(name: str, B: Tensor, A: Tensor, is_embedding: bool, count: int | None = None) -> Site | None:
    """The site of two tensors of PEFT's, or None where they are no pair."""
    if min(B.ndim, A.ndim) < 2 or not B.numel() * A.numel():
        return None
    axes = tuple(A.shape[1:]) if A.ndim > 2 else () if is_embedding else None
    if axes:
        groups = A.shape[0] // B.shape[1]
        count = groups if groups > 1 else None
    n = count or 1
    site = Site(name, B.shape[0] // (n if axes else 1), math.prod(A.shape[1:]), A.shape[0] // n, count, axes)
    return site if (_shape(site, False), _shape(site, True)) == (B.shape, A.shape) else None


def _shape(site: Site, is_A: bool) -> tuple[int, ...]:
    """Of PEFT's tensor."""
    r, n = site.r, site.count or 1
    if site.axes:
        return (r * n, *site.axes) if is_A else (site.out_features * n, r, *[1] * (len(site.axes) - 1))
    return (r * n, site.in_features) if is_A else (site.out_features, r * n)


def _as_ours(site: Site, is_A: bool, theirs: Tensor) -> Tensor:
    """The same numbers, a view of PEFT's tensor in the shape of `LoRALayout.split_sites`.

    PEFT keeps experts as A (count r, in), expert after expert, and B (out, r count), the experts taken in turn.
    """
    if is_A:
        ours = theirs.view(-1, site.r, site.in_features)
    elif site.axes:
        ours = theirs.view(-1, site.out_features, site.r)
    else:
        ours = theirs.unflatten(1, (site.r, -1)).permute(2, 0, 1)
    return ours[0] if site.count is None else ours
