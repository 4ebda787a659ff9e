"""A method of PEFT as a foreign format: export and import of its folders, and of its adapters in memory.

PEFT's own code writes and reads the tensors, on a stand-in for the base model: linear layers of the same names and
shapes. Each method lists pairs (a tensor of PEFT's, our view of the same numbers); both directions copy along that
list, so they cannot disagree.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from uniproj.errors import AdapterError, ProjectionError
from uniproj.exchange import bases, peft_folder
from uniproj.exchange.adapter import Adapter, LoRAAdapter
from uniproj.exchange.registry import Format
from uniproj.format.compatibility import first_difference
from uniproj.format.disk import exists
from uniproj.format.fields import Role, fields_of, used
from uniproj.format.file import CONFIG
from uniproj.format.heads import entitled
from uniproj.format.places import adapted_modules, places
from uniproj.layout import LoRALayout
from uniproj.projection import Projection
from uniproj.projections.lora import LoRA
from uniproj.registry import build, get
from uniproj.tuner.config import UniProjConfig
from uniproj.tuner.quantised import BaseWeights
from uniproj.tuner.saved import layout_of

_FLOAT32 = 1e-6  # frozen numbers this close are the same draw at float32 precision
_PASS_BASE = "Pass --base."
# fields that say where an adapter belongs: they have no meaning on the stand-in for the base model
_OF_THE_MODEL = (*fields_of(Role.BASE, Role.PLACE), "modules_to_save")

# a projection of ours that may be PEFT's: name, seed, hyperparameters
Candidate = tuple[str, int, dict[str, Any]]


@dataclass(frozen=True)
class Pair:
    """One tensor of PEFT's and our view of the same numbers; fixed: why PEFT's must not change, empty if it may."""

    where: str
    theirs: Tensor
    ours: Tensor
    fixed: str = ""


@dataclass(frozen=True)
class Attached:
    """One adapter of a PEFT model; `layers` by name in the base model, in PEFT's order of registration."""

    name: str
    config: Any
    layers: dict[str, Any]
    layout: LoRALayout

    def tensor(self, module: str, attribute: str) -> Any:
        """A tensor of one layer."""
        return getattr(self.layers[module], attribute)[self.name]

    def shared(self, attribute: str) -> Any:
        """A tensor that all layers share."""
        return self.tensor(next(iter(self.layers)), attribute)

    def fixed_without(self, flag: str) -> str:
        """Why a frozen tensor must not change; empty if the configuration makes PEFT save it."""
        return "" if getattr(self.config, flag) else f"PEFT redraws it on loading unless the config has {flag}=True"


class PeftMethod(Format):
    """A PEFT type. A subclass writes the class variables and the methods from `build` to `draws_ours`.

    kind: PEFT's name of the type; config: its class of configurations; accepts: the projections it can hold; saved: the
    fields that make PEFT save its frozen numbers, set unless it draws the same ones (`draws_ours`); only_linear:
    whether experts, embeddings, convolutions and attentions are refused; needs_order: whether P depends on the base
    model's order of registration; needs_weights: whether P depends on its weights.
    """

    kind: ClassVar[str]
    config: ClassVar[type[Any]]
    accepts: ClassVar[type[Projection]]
    saved: ClassVar[Mapping[str, Any]] = {}
    only_linear: ClassVar[bool] = True
    needs_order: ClassVar[bool] = False
    needs_weights: ClassVar[bool] = False

    # ---- what a subclass writes ---------------------------------------------------------------------

    def build(self, theirs: Attached) -> Projection:
        """P with PEFT's frozen tensors; the caller copies the learned ones along `pairs`."""
        raise NotImplementedError

    def pairs(self, theirs: Attached, P: Any, theta_d: Tensor) -> Iterator[Pair]:
        """Every tensor of PEFT's, with our view of the same numbers."""
        raise NotImplementedError

    def fields(self, P: Any, config: UniProjConfig) -> dict[str, Any]:
        """The fields of PEFT's configuration on which P depends."""
        raise NotImplementedError

    def candidates(self, P: Any, config: Any, order: tuple[str, ...]) -> Iterator[Candidate]:
        """The projections of ours that may be P; order: the modules in PEFT's order of registration."""
        raise NotImplementedError

    def moved(self, theirs: Any, ours: Any, theta_d: Tensor) -> Tensor | None:
        """The x with ours(x) = theirs(theta_d), or None if there is none."""
        same = theirs.name == ours.name and all(
            torch.allclose(mine.double(), theirs.constants()[name].double(), rtol=_FLOAT32, atol=_FLOAT32)
            for name, mine in ours.constants().items()
        )
        return theta_d if same else None

    def draws_ours(self, adapter: Adapter, drawn: Any) -> bool:
        """Whether PEFT draws the adapter's P from its seed; drawn: the P that PEFT draws."""
        return True

    def layers(self, model: PeftModel, adapter_name: str) -> dict[str, Any]:
        """PEFT's layers that hold an adapter, by the names of their sites."""
        return {
            name: layer
            for name, layer in model.base_model.model.named_modules()
            if isinstance(layer, BaseTunerLayer) and adapter_name in getattr(layer, "r", {})
        }

    # ---- adapters in memory -------------------------------------------------------------------------

    @torch.no_grad()
    def take(self, model: PeftModel, adapter_name: str, dtype: torch.dtype) -> tuple[Projection, Tensor]:
        """P and theta_d of a PEFT model's adapter; see `from_peft`."""
        theirs = self._open("from_peft", model, adapter_name)
        device = next(next(iter(theirs.layers.values())).parameters()).device
        P = self.build(theirs).to(device, torch.promote_types(dtype, torch.float32))
        theta_d = torch.zeros(P.d, dtype=dtype, device=device)
        pairs = list(self.pairs(theirs, P, theta_d))
        _check_shapes("from_peft", pairs)
        for pair in pairs:
            pair.ours.copy_(pair.theirs)
        return P, theta_d

    @torch.no_grad()
    def give(self, P: Projection, theta_d: Tensor, model: PeftModel, adapter_name: str = "default") -> None:
        """Write P and theta_d into a PEFT model's adapter; see `to_peft`."""
        theirs = self._open("to_peft", model, adapter_name)
        self._check_accepts("to_peft", P)
        if differs := first_difference(P.layout, theirs.layout):
            raise AdapterError(
                f"to_peft: {differs}, by the projection's layout (D = {P.D}; the adapter's has D = {theirs.layout.D}). "
                "Use the same base model, target_modules and ranks."
            )
        if theta_d.shape != (P.d,):
            raise AdapterError(
                f"to_peft: theta_d must have shape (d,) = ({P.d},), got {tuple(theta_d.shape)}. "
                "Write one adapter at a time."
            )
        if merged := [name for name, layer in theirs.layers.items() if adapter_name in layer.merged_adapters]:
            raise AdapterError(
                f"to_peft: {merged[0]} must not have {adapter_name!r} merged, got {len(merged)} modules that have. "
                "Call unmerge_adapter() first, or the base weight keeps the old update."
            )
        pairs = list(self.pairs(theirs, P, theta_d.contiguous()))
        _check_shapes("to_peft", pairs)
        for pair in (pair for pair in pairs if pair.fixed):
            ours, frozen = pair.ours.to(pair.theirs.device).double(), pair.theirs.double()
            if not torch.allclose(frozen, ours, rtol=_FLOAT32, atol=0.0):
                raise AdapterError(
                    f"to_peft: {pair.where} must already equal the projection's, as {pair.fixed}, got a difference of "
                    f"{(frozen - ours).abs().max():.3g}. Change that setting, or take the projection from this model."
                )
        for pair in pairs:
            pair.theirs.copy_(pair.ours)

    def _check_accepts(self, who: str, P: Projection) -> None:
        if not isinstance(P, self.accepts):
            raise AdapterError(
                f"{who}: an adapter of PEFT type {self.kind} must get a {self.accepts.__name__} projection, "
                f"got {P.name!r}. Use the PEFT type of that method, or train it with UniProjConfig."
            )

    def _open(self, who: str, model: PeftModel, adapter_name: str) -> Attached:
        layers = self.layers(model, adapter_name)
        for name, layer in layers.items():
            if found := (self.only_linear and _not_linear(layer)) or _not_plain(layer, adapter_name):
                raise AdapterError(
                    f"{who}: {name} must be a {'linear ' * self.only_linear}layer whose update is s B A, got {found}. "
                    "Leave it out of target_modules, or keep this adapter in PEFT."
                )
        config = model.peft_config[adapter_name]
        if tied := getattr(config, "target_modules_to_tie", None):
            raise AdapterError(
                f"{who}: every module must have an A and a B of its own, got {sorted(tied)[0]}, which has the input "
                "embedding's. Attach it without ensure_weight_tying, or keep this adapter in PEFT."
            )
        layout = layout_of(layers, adapter_name)
        return Attached(adapter_name, config, layers, layout)

    # ---- folders ------------------------------------------------------------------------------------

    def reads(self, folder: Path) -> bool:
        """Whether the configuration in a folder names this PEFT type."""
        return exists(folder / CONFIG) and peft_folder.peft_type(folder) == self.kind

    def write(self, adapter: Adapter, folder: Path, rank: int | None) -> None:
        """Write a folder of this PEFT type, with the same updates; PEFT's frozen numbers are saved if it would draw
        others.

        PEFT's methods have no alpha / r, so s is multiplied into theta_d: s B A is the update of sqrt(s) theta_d, or of
        s theta_d where c is one of the factors. Raises AdapterError for another method, for s or ranks that differ
        between modules, and for a TINYLORA without the base model, whose order of registration decides which modules
        share numbers.
        """
        self._check_accepts("export", adapter.projection)
        _refuse_other_kinds(adapter, self.kind)
        theta_d = self._scaled(adapter)
        if self.needs_order and adapter.order is None:
            raise AdapterError(
                f"export: {self.kind} ties modules in the order of the base model, got none. {_PASS_BASE}"
            )
        P, ours = adapter.projection, adapter.config
        shapes = P.layout.shapes()
        shapes = {name: shapes[name] for name in adapter.order or _known_order(adapter)}
        r = P.layout.pairs()[0][1].shape[0]
        fields = {"r": r, f"{self.kind.lower()}_dropout": ours.lora_dropout, **self.fields(P, ours)}
        with bases.quietly():
            model = _attached(self.config(**fields), shapes)
            if self.saved and not self.draws_ours(adapter, self.take(model, "default", torch.float64)[0]):
                model = _attached(self.config(**fields, **self.saved), shapes)
            self.give(P, theta_d, model)
            tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
        config = model.peft_config["default"]
        _copy_places(ours, config, list(shapes))
        config.bias = ours.bias.replace("lora", self.kind.lower())
        tensors = {name: tensor.detach() for name, tensor in {**tensors, **adapter.other}.items()}
        index = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        peft_folder.write(folder, {**config.to_dict(), "inference_mode": True}, index, tensors.values())

    def read(self, folder: Path, base: str | nn.Module | None, trust_remote_code: bool) -> Adapter | LoRAAdapter:
        """Read an adapter of this PEFT type; the updates are the same up to float32's rounding.

        P is one of `candidates` if one of them gives the same theta_D; else A and B are kept as `lora`, D numbers.
        Raises AdapterError without a base model, of which only TINYLORA needs the weights, and for tensors that do not
        fit it.
        """
        config = peft_folder.read_config(folder, self.kind)
        tensors = peft_folder.read_tensors(folder)
        kind = self.kind.lower()
        if base is None:
            raise AdapterError(
                f"{folder}: which modules an adapter of {self.kind} belongs to, and in which order, the base model "
                f"alone tells. {_PASS_BASE}"
            )
        model = bases.load(base, config, self.needs_weights, trust_remote_code)
        shapes = adapted_modules(model, config)
        own = {name: tensor for name, tensor in tensors.items() if f".{kind}_" in name}
        with bases.quietly():
            P, theta_d = self.take(self._filled(folder, config, shapes, own), "default", torch.float64)
        weights = BaseWeights(places(model, config)) if self.needs_weights else None
        found, theta_d, hyperparameters = self.rebuilt(P, theta_d, config, tuple(shapes), weights)
        other = {name: tensor for name, tensor in tensors.items() if name not in own}
        ours = UniProjConfig(
            projection=found.name,
            projection_seed=found.seed,
            projection_kwargs=hyperparameters,
            lora_dropout=getattr(config, f"{kind}_dropout"),
            bias=config.bias.replace(kind, "lora"),
            d=found.d if found.free_d else None,
            **_rank_fields(P.layout, config.r),
        )
        _copy_places(config, ours, list(shapes))
        other = entitled(other, config.to_dict(), shapes, str(folder))
        return Adapter(found, theta_d, ours, P.layout, dict.fromkeys(shapes, 1.0), other, tuple(shapes))

    @torch.no_grad()
    def rebuilt(
        self, P: Projection, theta_d: Tensor, config: PeftConfig, order: tuple[str, ...], weights: Mapping | None
    ) -> tuple[Projection, Tensor, dict[str, Any]]:
        """A P of the registry that gives the same theta_D, its theta_d, and its hyperparameters.

        order: the modules in PEFT's order of registration; weights: the base model's, if P is made of them. Where no
        candidate gives the same theta_D it is `lora`, whose theta_d is theta_D itself.
        """
        for name, seed, hyperparameters in self.candidates(P, config, order):
            options = hyperparameters | ({"base_weights": weights} if get(name).needs_base_weights else {})
            size = {"d": P.d} if get(name).free_d else {}
            try:
                found = build(name, layout=P.layout, seed=seed, **size, **options)
            except ProjectionError:
                continue  # a seed or a size that this one does not take
            if found.d == P.d and (moved := self.moved(P, found, theta_d)) is not None:
                return found, moved, hyperparameters
        return LoRA(P.layout), P(theta_d), {}

    def _scaled(self, adapter: Adapter) -> Tensor:
        config, found = adapter.config, set(adapter.scales.values())
        if config.remap:
            raise AdapterError(f"export: {self.kind} knows no renamed modules, got {config.remap}. Export to lora.")
        if len(found) > 1 or min(found) <= 0:
            raise AdapterError(
                f"export: {self.kind} has no alpha, so s = alpha / r must be one positive number for all modules, got "
                f"{sorted(found)}. Export to lora."
            )
        for name in ("trainable_token_indices", "layer_replication", "alora_invocation_tokens"):
            if getattr(config, name):
                raise AdapterError(f"export: {self.kind} has no {name}, got some. Export to lora.")
        (s,) = found
        return (adapter.theta_d.double() * (s if adapter.projection.offset is not None else s**0.5)).float()

    def _filled(
        self, folder: Path, config: PeftConfig, shapes: Mapping[str, tuple[int, int]], own: Mapping[str, Tensor]
    ) -> PeftModel:
        """PEFT's model with these tensors. Raises AdapterError for a missing, an extra, or a misshapen tensor."""
        plain = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
        plain = {name: value for name, value in plain.items() if name not in (*_OF_THE_MODEL, "peft_type")}
        model = _attached(self.config(**plain | {"inference_mode": False, "bias": "none"}), shapes)
        try:
            result = set_peft_model_state_dict(model, dict(own))
        except (RuntimeError, ValueError, KeyError) as error:
            raise AdapterError(
                f"{folder}: must fit the base model, got {error}. Pass the adapter's own base."
            ) from error
        # each layer lists the tensors that all layers share: one of them loaded, all are
        state = model.state_dict()
        loaded = {state[name].data_ptr() for name in state.keys() - set(result.missing_keys)}
        lacking = (n for n in result.missing_keys if f".{self.kind.lower()}_" in n)
        if odd := [*result.unexpected_keys, *(n for n in lacking if state[n].data_ptr() not in loaded)]:
            raise AdapterError(
                f"{folder}: every tensor must belong to a module of the base model and the other way round, got "
                f"{odd[0]} on one side alone. Pass the adapter's own base, or an adapter that is whole."
            )
        return model


def _known_order(adapter: Adapter) -> tuple[str, ...]:
    modules = adapter.projection.layout.modules
    order = adapter.config.projection_kwargs.get("module_order") or range(len(modules))
    return tuple(modules[m] if isinstance(m, int) else m for m in order)


def _attached(config: PeftConfig, shapes: Mapping[str, tuple[int, int]]) -> PeftModel:
    config.target_modules = list(shapes)
    return get_peft_model(bases.stand_in(shapes), config)


def _copy_places(source: Any, target: Any, modules: list[str]) -> None:
    for name in _OF_THE_MODEL:
        if hasattr(target, name) and hasattr(source, name):
            setattr(target, name, getattr(source, name))
    if getattr(source, "exclude_modules", None) and not hasattr(target, "exclude_modules"):
        target.target_modules = modules


def _rank_fields(layout: LoRALayout, r: int) -> dict[str, Any]:
    """r, and a rank_pattern of the modules whose rank PEFT lowered to their size; alpha = r, so that s = 1."""
    cut = {a.module: a.shape[0] for _, a in layout.pairs() if a.shape[0] != r}
    return {"r": r, "lora_alpha": r, "rank_pattern": cut, "alpha_pattern": dict(cut)}


def _refuse_other_kinds(adapter: Adapter, to: str) -> None:
    """Raises AdapterError for a site that is no linear layer, which few formats can say."""
    names = [site.name for site in adapter.layout.sites]
    wrapped = wraps(adapter.config, names)
    for site in adapter.layout.sites:
        if not site.is_plain or site.name in wrapped or is_parameter(adapter.config, site.name):
            raise AdapterError(
                f"export: {to} holds linear layers alone, got {site.name}, which is none. Export to lora, or leave it "
                "out of target_modules and target_parameters."
            )


def refuse_all_but_linear(adapter: Adapter, to: str) -> None:
    """Raises AdapterError for anything but A and B of the linear layers that the base model has: a head, a bias, added
    tokens or anything else that is trained beside them, another kind of layer, replicated layers, an aLoRA."""
    config = vars(adapter.config)
    besides = [f"{name}={config[name]!r}" for name in used(config, Role.BESIDE)] + sorted(adapter.other)[:1]
    if besides:
        raise AdapterError(
            f"export: an adapter for {to} must hold A and B alone, got {', '.join(besides)}. Export to lora and "
            "merge it into the base model, or train the adapter without."
        )
    _refuse_other_kinds(adapter, to)
    for name in ("layer_replication", "alora_invocation_tokens"):
        if config[name]:
            raise AdapterError(f"export: {to} has no {name}, got {config[name]}. Export to lora.")


def wraps(config: LoraConfig, sites: Sequence[str]) -> dict[str, int]:
    """{module: how many of PEFT's layers stand around it and what it holds}: one for each of its own parameters that
    are adapted, and one for an attention, whose output projection is adapted as its part."""
    known = set(sites)
    found = Counter(site.rpartition(".")[0] for site in sites if is_parameter(config, site))
    return found + Counter(parent for site in sites if (parent := site.removesuffix(".out_proj")) in known - {site})


def is_parameter(config: LoraConfig, site: str) -> bool:
    """Whether a site is a parameter that a configuration targets."""
    return f".{site}".endswith(tuple(f".{target}" for target in config.target_parameters or ()))


def _not_linear(layer: Any) -> str:
    """Which other kind a layer is; empty for a linear one."""
    if hasattr(layer, "parameter_name"):
        return f"target_parameters {layer.parameter_name!r}"
    adapted = layer.get_base_layer()
    is_other = isinstance(adapted, (nn.Embedding, nn.modules.conv._ConvNd, nn.MultiheadAttention))
    return type(adapted).__name__ if is_other else ""


def _not_plain(layer: Any, adapter_name: str) -> str:
    """Why the update of a layer is not s B A; empty if it is."""
    if adapter_name in getattr(layer, "lora_variant", {}):
        return type(layer.lora_variant[adapter_name]).__name__
    return "lora_bias=True" if getattr(layer, "lora_bias", {}).get(adapter_name) else ""


def _check_shapes(who: str, pairs: list[Pair]) -> None:
    for pair in pairs:
        if pair.theirs.shape != pair.ours.shape:
            raise AdapterError(
                f"{who}: {pair.where} must have the projection's shape {tuple(pair.ours.shape)}, "
                f"got {tuple(pair.theirs.shape)}. Use the same hyperparameters on both sides."
            )
