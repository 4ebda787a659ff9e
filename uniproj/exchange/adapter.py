"""`Adapter`: P, theta_d and what belongs to them, apart from any model; `LoRAAdapter`: the same updates as A and B."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PretrainedConfig

from uniproj.errors import AdapterError
from uniproj.exchange import bases
from uniproj.format import file
from uniproj.format.compatibility import check_layout
from uniproj.format.header import Header, scale
from uniproj.format.keys import OF_P, OWN, THETA_D, plain
from uniproj.format.patterns import of_sites
from uniproj.format.places import adapted_modules, layout_on, places
from uniproj.format.remap import new_names
from uniproj.format.tensors import check_numbers, check_shapes, shapes_of
from uniproj.layout import LoRALayout
from uniproj.projection import Projection
from uniproj.registry import build, get
from uniproj.tuner import adapter_of
from uniproj.tuner.config import UniProjConfig
from uniproj.tuner.embeddings import check_embeddings
from uniproj.tuner.layers import adapted
from uniproj.tuner.quantised import BaseWeights


@dataclass(frozen=True)
class LoRAAdapter:
    """The A and B of an adapter, without a model.

    theta_D: (D,) in the order of `layout`; scales: s of delta W = s B A by module; config: a LoraConfig, or one that
    extends it; other: the remaining tensors of the file, such as a classification head, by PEFT's names; order: as in
    `Adapter`.
    """

    layout: LoRALayout
    theta_D: Tensor
    scales: Mapping[str, float]
    config: LoraConfig
    other: Mapping[str, Tensor]
    order: tuple[str, ...] | None = None

    def padded(self, rank: int, scale: float) -> Iterator[tuple[Tensor, Tensor]]:
        """B (out, rank) and A (rank, in) of every linear layer with delta W = scale B A, in the dtype of theta_D.

        Columns of B and rows of A that are 0 bring every site to `rank`; where s is not `scale`, s / scale is
        multiplied into B, which is rounded once.
        """
        factors = self.layout.split_sites(self.theta_D)
        for site, B, A in zip(self.layout.sites, factors[::2], factors[1::2], strict=True):
            s, more = self.scales[site.name], rank - site.r
            scaled = B if s == scale else (s / scale * B.double()).to(B.dtype)
            yield pad(scaled, (0, more)), pad(A, (0, 0, 0, more))


@dataclass(frozen=True)
class Adapter:
    """theta_d (d,) and P, with the trained values of its Parameters, without a model.

    layout: P's, with the names that the modules have in the base model now; scales: s of delta W = s B A by these
    names; other: the remaining tensors of the file, by PEFT's names; order: the modules in the base model's order of
    registration, and base: its configuration, or None where they are unknown.
    """

    projection: Projection
    theta_d: Tensor
    config: UniProjConfig
    layout: LoRALayout
    scales: Mapping[str, float]
    other: Mapping[str, Tensor]
    order: tuple[str, ...] | None = None
    base: PretrainedConfig | None = None

    def __post_init__(self) -> None:
        """Raises AdapterError for numbers that no file may hold: NaN, inf, or theta_d = 0 where c = 0."""
        numbers = {THETA_D: self.theta_d, **dict(self.projection.named_parameters()), **self.other}
        check_numbers(numbers, self.projection.name, has_offset=self.projection.offset is not None)

    @classmethod
    def of_file(
        cls, folder: str | Path, base: str | nn.Module | None = None, trust_remote_code: bool = False
    ) -> Adapter:
        """A saved adapter. Raises AdapterError for a bad file, and where P cannot be made without the base model.

        base: the base model (or its name), for a P that is made of its weights, and for a file without a header;
        trust_remote_code: whether Python code that comes with a model of this name may run.
        """
        saved = file.read(file.locate(folder))
        config = UniProjConfig.of_saved(saved, folder)
        needs_weights = get(config.projection).needs_base_weights
        if base is None and (needs_weights or saved.header is None):
            why = (
                f"{config.projection} is made of its weights"
                if needs_weights
                else "the file was written before format 1 and does not list its modules"
            )
            raise AdapterError(f"{folder}: the base model must be given, as {why}. Pass --base.")
        model = None if base is None else bases.load(base, config, needs_weights, trust_remote_code)
        if saved.header is not None:
            weights = None
            if model is not None:
                names = check_layout(saved.header, layout_on(model, config), config.remap or [])
                weights = bases.weights_of(places(model, config), names) if needs_weights else None
            P = saved.header.build(weights, str(folder), on_base=model is not None)
        else:
            assert model is not None
            P = _without_header(config, model, folder)
        check_shapes(saved.tensors, shapes_of(P), P.name)
        tensors = dict(saved.tensors)
        theta_d = tensors.pop(THETA_D).float()
        own = {name.removeprefix(OF_P): tensors.pop(name) for name in list(tensors) if name.startswith(OF_P)}
        P.load_state_dict(own)
        order = None if model is None else tuple(adapted_modules(model, config))
        layout = _as_named_now(P.layout, config)
        return cls(P, theta_d, config, layout, scales(config, layout), tensors, order, bases.described(model))

    @classmethod
    def of_model(cls, model: PeftModel, adapter_name: str = "default") -> Adapter:
        """An adapter of a model in memory, with the model's own P. Raises AdapterError for another PEFT type."""
        P = adapter_of(model, adapter_name, "export").P
        check_embeddings(model, adapter_name, "auto")
        state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        theta_d = state[THETA_D].detach().float().to(P.device)
        other = {name: tensor.detach().cpu() for name, tensor in state.items() if not name.startswith(OWN)}
        config = model.peft_config[adapter_name]
        layout = _as_named_now(P.layout, config)
        modules = {site.name: site.modules for site in layout.sites}
        known = {plain(f"{name}."): name for name in modules}  # parts of the model may have been compiled since
        layers = {known[plain(f"{name}.")]: m for name, m in adapted(model.base_model.model, adapter_name).items()}
        scaling = {name: float(layer.scaling[adapter_name]) for name, layer in layers.items()}
        within: dict[int, list[str]] = {}
        for name, layer in layers.items():  # of several parameters of one module the last stands around the others
            within.setdefault(id(layer.get_base_layer()), []).insert(0, name)
        order = tuple(module for names in within.values() for name in names for module in modules[name])
        return cls(P, theta_d, config, layout, scaling, other, order, bases.described(model.get_base_model()))

    @torch.no_grad()
    def lora(self) -> LoRAAdapter:
        """The same updates as LoRA's A and B, in float32 as the model computes them."""
        theta_D = self.projection(self.theta_d).cpu()
        return LoRAAdapter(self.layout, theta_D, self.scales, self.config, self.other, self.order)

    def save(self, folder: str | Path) -> None:
        """Write a uniproj adapter, theta_d and Parameters in float32.

        Raises AdapterError for numbers beyond float32, and where the disk refuses.
        """
        own = {f"{OF_P}{name}": p.detach().float() for name, p in self.projection.named_parameters()}
        tensors = {THETA_D: self.theta_d.float(), **own, **self.other}
        config = {**self.config.to_dict(), "inference_mode": True}
        file.write(folder, tensors, Header.of(config, self.projection), config)


def _as_named_now(layout: LoRALayout, config: UniProjConfig) -> LoRALayout:
    return layout.renamed(new_names(layout, config.remap or []))


def _without_header(config: UniProjConfig, model: nn.Module, folder: str | Path) -> Projection:
    """P of a file without a header, on the modules of its base model."""
    layout, options = layout_on(model, config), dict(config.projection_kwargs)
    if get(config.projection).needs_base_weights:
        options["base_weights"] = BaseWeights(places(model, config))
    P = build(config.projection, layout=layout, d=config.d, seed=config.projection_seed, **options)
    found = (layout.fingerprint, P.checksum())
    if (config.layout_fingerprint, config.projection_checksum) != found:
        raise AdapterError(
            f"{folder}: the base model must have the modules, shapes and weights that the adapter was trained on, got "
            f"layout {found[0][:12]}.. and P {found[1][:12]}... Pass the base model (and dtype) of the adapter."
        )
    return P


def lora_fields(config: LoraConfig) -> dict[str, Any]:
    """The fields that LoraConfig takes, without PEFT's type and runtime_config, which is the state of one session."""
    names = {f.name for f in dataclasses.fields(LoraConfig) if f.init} - {"peft_type", "runtime_config"}
    return {name: getattr(config, name) for name in names}


def scales(config: LoraConfig, layout: LoRALayout, rank: int | None = None) -> dict[str, float]:
    """PEFT's alpha / r, or alpha / sqrt(r), of every site, by the first pattern that matches its name."""
    names = [site.name for site in layout.sites]
    alphas = of_sites("alpha_pattern", config.alpha_pattern, names, config.lora_alpha)
    return {site.name: scale(alphas[site.name], rank or site.rank, config.use_rslora) for site in layout.sites}
