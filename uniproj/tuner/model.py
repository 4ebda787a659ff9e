"""`UniProjModel`: PEFT's LoraModel whose A and B come from one vector."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import _ExcludedModule
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from uniproj.errors import AdapterError
from uniproj.format import patterns
from uniproj.format.heads import check_tokens
from uniproj.format.keys import HEADS, IDENTITY, METHOD, TUNER, in_file, in_model, in_this_format, plain
from uniproj.format.places import tied_to_embedding
from uniproj.projection import Projection
from uniproj.registry import build, get
from uniproj.tuner.bypass import Guard
from uniproj.tuner.checkpointing import refuse_reentrant, several_processes
from uniproj.tuner.config import UniProjConfig
from uniproj.tuner.injected import Injected, put_on, take_off, tuner_on
from uniproj.tuner.keys import beside_P, biases
from uniproj.tuner.layers import device_and_dtype, factors_of, plug, tie
from uniproj.tuner.liveness import check_alive
from uniproj.tuner.merging import check_merge
from uniproj.tuner.quantised import BaseWeights, keep_unpacked
from uniproj.tuner.saved import (
    Identity,
    as_saved,
    check_loaded,
    check_saved,
    describe,
    layout_of,
    own_config,
    places_of,
)
from uniproj.tuner.targets import adapted_layers, check_name, named_in_full, refuse_copy
from uniproj.tuner.theta import Call, FactorSource
from uniproj.tuner.undo import unchanged_on_failure


class UniProjModel(LoraModel):
    """Injection, merging and quantised layers are PEFT's; what is trained is one theta_d per adapter (`adapter_of`).

    After injection the `weight` of every `lora_A` and `lora_B` is a view of theta_D = P theta_d + c, projected once in
    each call of the model, at whichever of its modules (`FactorSource` has the rule).
    """

    prefix = METHOD
    _replicated: list[list[int]] | None
    uses_shared_state = False  # as without a PeftModel the model itself holds it

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any):
        # without a name for it, PEFT gives the configuration of `inject_adapter_in_model` alone
        self._is_injected = isinstance(peft_config, PeftConfig)
        self._layers: list[LoraLayer] = []  # that hold adapters
        tuner: UniProjModel | None = tuner_on(model) if self._is_injected else None
        if tuner is None:
            if any(isinstance(module, LoraLayer) for module in model.modules()):
                raise AdapterError(
                    "get_peft_model: the base model must hold no adapter yet, got one with LoRA layers. "
                    "Add to the existing PeftModel with add_adapter, or call its unload() first."
                )
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        else:
            nn.Module.__init__(self)
            self.model: Any = model  # all that PEFT uses of this tuner
            tuner._add(adapter_name, peft_config, *args, **kwargs)

    @property
    def projections(self) -> nn.ModuleDict:
        """P of every adapter."""
        return self.uniproj_projections

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's injection, then P. A failure leaves the model as it was and raises AdapterError or ProjectionError."""
        given = self.peft_config[adapter_name]
        check_name(adapter_name, self.peft_config, given.modules_to_save or ())
        if self._is_injected and given.alora_invocation_tokens:
            raise AdapterError(
                "alora_invocation_tokens: a PeftModel must find these tokens in each row of a batch, got a model with "
                "an injected adapter, which would act on no token. Use get_peft_model or PeftModel.from_pretrained."
            )
        # hasattr would look into the base model too
        first = "_sources" not in self.__dict__
        check_tokens(given.trainable_token_indices, model)
        twins = [name for name, other in self.peft_config.items() if other is given and name != adapter_name]
        # the header of a saved adapter lists its modules one by one
        asked = None if given.header is not None else given.target_modules
        with unchanged_on_failure(self):
            if first:
                self._prepare()
            flags = [(p, p.requires_grad) for source in self._sources.values() for p in source.parameters()]
            self._prepare_adapter_config(given, self.get_model_config(model))
            self._replicate(given)
            with named_in_full(self.peft_config, adapter_name, model, asked):
                # P makes every A and B, so those that PEFT draws here may stay on the meta device
                super().inject_adapter(model, adapter_name, *args, **{**kwargs, "low_cpu_mem_usage": True})
            self._attach(adapter_name)
            refuse_copy(twins, self.uniproj_theta_d, adapter_name)
            _set_requires_grad(flags)

    def _add(self, adapter_name: str, config: UniProjConfig, *args: Any, **kwargs: Any) -> None:
        """A further adapter by `inject_adapter_in_model`, which activates it."""
        if adapter_name in self._sources:
            raise AdapterError(
                f"inject_adapter_in_model: the name of an adapter must be new, got {adapter_name!r} again. "
                "Choose another, or delete that adapter first."
            )
        # Transformers takes it from a model without adapters
        configs = {**getattr(self.model, "peft_config", {}), adapter_name: config}
        self.peft_config: dict[str, Any] = configs
        self.model.peft_config = configs
        try:
            self.inject_adapter(self.model, adapter_name, *args, **kwargs)
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters; of injected ones as the layers have them, where Transformers sets them."""
        active = self._layers[0].active_adapters if self._is_injected and self._layers else self.active_adapter
        return [active] if isinstance(active, str) else list(active)

    @staticmethod
    def _check_target_module_exists(peft_config: UniProjConfig, key: str) -> Any:
        if peft_config.places is None:
            return bool(patterns.targets(peft_config, [key])[0])
        return _ExcludedModule() if key in peft_config.left else key in peft_config.places

    def _create_and_replace(
        self, lora_config: UniProjConfig, adapter_name: str, *args: Any, current_key: str, **kwargs: Any
    ) -> None:
        own = copy.copy(lora_config)
        own.r, own.lora_alpha = (lora_config.places or {}).get(current_key, (own.r, own.lora_alpha))
        if is_tied := self._check_tied_module_exists(lora_config, current_key):
            embedding = self.model.get_input_embeddings()
            own.r, own.lora_alpha = embedding.r[adapter_name], embedding.lora_alpha[adapter_name]
        super()._create_and_replace(own, adapter_name, *args, current_key=current_key, **kwargs)
        if is_tied:
            tie(self.model.get_submodule(current_key), embedding, adapter_name)

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        return sorted(tied_to_embedding(self.model))

    def _check_tied_modules(self, model: Any, peft_config: UniProjConfig) -> None:
        """PEFT's, which knows an embedding by the names of Llama's alone."""
        tied = self._get_module_names_tied_with_embedding() if peft_config.ensure_weight_tying else []
        embedding = model.get_input_embeddings() if tied else None
        if any(module is embedding and name in (peft_config.places or ()) for name, module in model.named_modules()):
            with warnings.catch_warnings(action="ignore"):  # that nothing tied is adapted
                super()._check_tied_modules(model, peft_config)
            self._add_targets_to_tie(peft_config, tied)
        else:
            super()._check_tied_modules(model, peft_config)

    def _add_modules_to_save_to_tie(self, peft_config: UniProjConfig, tied_weight_keys: list[str]) -> None:
        raise AdapterError(
            "ensure_weight_tying: modules_to_save must hold no embedding that is tied, as PEFT would save its one copy "
            f"as two heads, got {peft_config.modules_to_save}. Name it in target_modules, or train some of its rows by "
            "trainable_token_indices."
        )

    def _replicate(self, config: UniProjConfig) -> None:
        """Let the base model have each of its layers as often as `layer_replication` says, with the weights of one.

        Done for the first adapter; raises AdapterError for others that say something else, and for layers that the
        base does not have.
        """
        spans = [list(span) for span in config.layer_replication or ()]
        if self._replicated is None:
            try:
                self._prepare_model(config, self.model)
            except (IndexError, ValueError) as error:
                raise AdapterError(
                    f"layer_replication: must name layers [start, end) of the base model, got {spans}: {error}. "
                    "Correct it."
                ) from error
            self._replicated = spans
        elif self._replicated != spans:
            raise AdapterError(
                "add_adapter: layer_replication must be as the model's first adapter has it, as it makes the layers "
                f"that all of them adapt, {self._replicated or None}, got {spans or None}. Attach it to a base model "
                "of its own."
            )

    def _prepare(self) -> None:
        holder = self.model if self._is_injected else self  # PEFT's tuners have the attributes of their model
        holder.uniproj_theta_d, holder.uniproj_projections = nn.ParameterDict(), nn.ModuleDict()
        holder.uniproj_identity = nn.ModuleDict()
        if self._is_injected:
            put_on(self.model, self)
        self._check_of_states = holder.register_load_state_dict_pre_hook(self._check_state)
        self._sources: dict[str, FactorSource] = {}
        self._made_by: dict[str, UniProjConfig] = {}
        self._adapters_enabled = True
        self._replicated = None
        self._call = Call()
        self._hooks: list[RemovableHandle] = []
        self._guard = Guard(self.model)

    def _attach(self, adapter_name: str) -> None:
        config: UniProjConfig = self.peft_config[adapter_name]
        layers = as_saved(adapted_layers(self.model, adapter_name), config)
        first = next(iter(layers.values()))
        is_trained = _is_trained(first, adapter_name)
        projection = self._build(config, adapter_name, layers)
        device = _device(first)
        # low_cpu_mem_usage: new Parameters are on the meta device until the file is loaded into them
        projection._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
        check_saved(config, projection, self.model)
        self.uniproj_projections[adapter_name] = projection
        self.uniproj_identity[adapter_name] = Identity(config, projection)
        self.uniproj_theta_d[adapter_name] = nn.Parameter(projection.init_theta(config.init_seed).to(device))
        source = FactorSource(self.uniproj_theta_d, self.projections, adapter_name, self._call)
        self._sources[adapter_name] = source
        for index, site in enumerate(projection.layout.sites):
            plug(layers[site.name], adapter_name, source, index)
        _set_requires_grad([(p, is_trained) for p in source.parameters()])
        self._watch_calls()
        keep_unpacked(self.model)
        check_alive(layers, adapter_name, is_trained)
        self._guard.renew()
        self._made_by[adapter_name] = copy.deepcopy(config)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """theta_d stays float32; with autocast_adapter_dtype=False the factors have the dtype of the base weights."""
        first = next(m for m in self.model.modules() if isinstance(m, LoraLayer) and adapter_name in m.r)
        _, dtype = device_and_dtype(first)
        if not autocast_adapter_dtype and dtype is not None and dtype.is_floating_point:
            self._sources[adapter_name].dtype = dtype

    def _build(self, config: UniProjConfig, adapter_name: str, layers: dict[str, LoraLayer]) -> Projection:
        options = dict(config.projection_kwargs)
        if get(config.projection).needs_base_weights:
            options["base_weights"] = BaseWeights(places_of(layers))
        layout = layout_of(layers, adapter_name)
        return build(config.projection, layout=layout, d=config.d, seed=config.projection_seed, **options)

    # ---- forward ----------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Give every new adapter a configuration object of its own, when the model is first used.

        Until then PEFT writes the names of heads into the object that the caller gave, who may reuse it for the next
        adapter.
        """
        for name, made_by in self._made_by.items():
            self.peft_config[name] = own_config(self.peft_config[name], made_by)
        self._made_by = {}

    def _watch_calls(self) -> None:
        """Hook the modules around adapted layers, any of which a caller may call.

        Left out, as hooks there would take 1 % of a generated token, is the inmost module around a layer (an attention,
        an MLP), unless the model itself has it as a child. Where one of these is called by itself, each look of a layer
        at its factors is a call of its own, and the `Guard` is not asked.
        """
        for hook in self._hooks:
            hook.remove()
        adapted = {name: module for name, module in self.model.named_modules() if isinstance(module, LoraLayer)}
        self._layers = list(adapted.values())
        holders = {name.rpartition(".")[0] for name in adapted}
        around = {name[:end] for name in holders for end, letter in enumerate(name) if letter == "."}
        children = {name.partition(".")[0] for name in holders}
        self._hooks = []
        for name in {"", *children, *around}:
            module = self.model.get_submodule(name)
            enter = self._enter if name else self._begin_call
            self._hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._leave, always_call=True))
        if hasattr(type(self.model), "generate"):  # in the model itself, where every way to generate ends
            self.model.__dict__.setdefault("generate", self._generate)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`, all of it as one."""
        with self._call.generation():
            return type(self.model).generate(self.model, *args, **kwargs)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        # the same module again: a KeyboardInterrupt ended its last call, and PyTorch then runs no hooks
        if self._call.module is None or self._call.module is module:
            self._begin_call(module, args, kwargs)

    def _begin_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._call.begin(module)
        if self._made_by and not torch.compiler.is_compiling():
            self._settle()
        active = [name for name in self.active_adapters if name in self._sources]
        if self._adapters_enabled:
            for name in active:
                source = self._sources[name]
                if (source.per_row is not None or several_processes()) and source.wants_grad():
                    refuse_reentrant(self.model)
                source.views()
        self._guard.begin(module, active, args, kwargs)

    def _leave(self, module: nn.Module, _: Any, output: Any) -> None:
        if self._call.module is module:
            self._call.end()
            self._guard.end(module, output)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._adapters_enabled = enabled

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter with its theta_d and its P."""
        super().delete_adapter(adapter_name)
        self.forget(adapter_name)

    def forget(self, adapter_name: str) -> None:
        """Remove what this tuner itself has of an adapter that PEFT has deleted from the layers."""
        for layer in self._layers:  # PEFT skips modules of the base whose name contains the prefix
            if adapter_name in layer.r:
                layer.delete_adapter(adapter_name)
        self._sources.pop(adapter_name, None)
        self._made_by.pop(adapter_name, None)
        for holder in (self.uniproj_theta_d, self.uniproj_projections, self.uniproj_identity):
            if adapter_name in holder:
                del holder[adapter_name]
        # where it was active on a layer that holds no other adapter, PEFT has activated none there
        active = [layer.active_adapters for layer in self._layers]
        if any(active) and not all(active):
            self.set_adapter(next(filter(None, active)))
        self._guard.renew()

    # ---- merging ----------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's merge. Raises AdapterError where the merged model would be another one (`merging.check_merge`)."""
        self._check_merge(adapter_names)
        with torch.no_grad():
            super().merge_adapter(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """PEFT's unmerge: subtracts s B A as it is now."""
        with torch.no_grad():
            super().unmerge_adapter()

    def _check_merge(self, adapter_names: list[str] | None) -> None:
        if any(source.per_row is not None for source in self._sources.values()):
            raise AdapterError(
                "merge: all rows of a batch must have one theta_d, got a block of `mixed`, where each has its own. "
                "Leave the block, and merge the adapter that bank.select sets."
            )
        self._check_merge_allowed()
        check_merge(self.model, adapter_names or self.active_adapters)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            self._check_merge(kwargs.get("adapter_names"))
        with torch.no_grad():
            model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
            # once more for what lies within a layer around a parameter, which PEFT takes for a part of that layer
            while any(isinstance(module, LoraLayer) for module in model.modules()):
                model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        for hook in self._hooks:
            hook.remove()
        if self.model.__dict__.get("generate") == self._generate:
            del self.model.generate
        self._guard.remove()
        self._check_of_states.remove()
        if self._is_injected:
            take_off(self.model)
        return model

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: B A is bilinear in theta_d, so no vector stands for a weighted sum of updates."""
        raise AdapterError(
            "add_weighted_adapter: the sum of two updates B A is not the update of any theta_d (B A is bilinear). "
            "Activate several adapters with set_adapter([...]), or merge them one after the other."
        )

    # ---- saving and loading -----------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: UniProjConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        *_: Any,
        **__: Any,
    ) -> dict[str, Tensor]:
        if not state_dict and dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
            return {}  # all that is sharded was gathered on the first process, which saves it
        whole, front = _whole(model)
        named = {front + key: value for key, value in state_dict.items()}
        own = describe(whole, config, adapter_name, {plain(key): value for key, value in named.items()})
        rest = beside_P(whole, named, adapter_name)
        own |= biases(whole, rest, adapter_name)
        # PEFT takes heads and embeddings out of this very dictionary afterwards
        state_dict.clear()
        state_dict.update({key.removeprefix(front): value for key, value in rest.items()})
        return {key.removeprefix(front): value for key, value in own.items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return in_file(plain(key), adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: UniProjConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        whole, front = _whole(model)
        tuner: UniProjModel = whole.base_model
        tensors = {key if key.startswith(TUNER) else front + key: tensor for key, tensor in state_dict.items()}
        tensors = {in_this_format(key): tensor for key, tensor in tensors.items()}
        tensors = check_loaded(whole, adapter_name, tensors)
        tuner._settle()
        now = {plain(key): key for key in whole.state_dict()}
        known = {**tensors, IDENTITY: tuner.uniproj_identity[adapter_name].get_extra_state()}
        mapped = {in_model(key, adapter_name): value for key, value in known.items()}
        return {now.get(key, key).removeprefix(front): value for key, value in mapped.items()}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """As PyTorch's, of the keys of any format."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            now = in_this_format(f"{TUNER}{key.removeprefix(prefix)}")
            state_dict[f"{prefix}{now.removeprefix(TUNER)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _check_state(self, _: nn.Module, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
        """Raises AdapterError for numbers of another P or scale, before any is copied.

        Numbers without an identity, as in a checkpoint from before format 3 or a dictionary of the trained Parameters,
        are taken for this model's own, as PyTorch does.
        """
        identity: Identity
        for name, identity in self.uniproj_identity.items():  # type: ignore[assignment]
            key = f"{prefix}{in_model(IDENTITY, name).removeprefix(TUNER)}"
            identity.check(name, state_dict.setdefault(key, identity.get_extra_state()))


def _whole(model: Any) -> tuple[Any, str]:
    """A model by the names of a PeftModel, and what those have in front of the model's own."""
    tuner = tuner_on(model)
    return (model, "") if tuner is None else (Injected(tuner), HEADS)


def _set_requires_grad(wanted: Iterable[tuple[nn.Parameter, bool]]) -> None:
    for parameter, requires_grad in wanted:
        parameter.requires_grad_(requires_grad)


def _is_trained(layer: LoraLayer, adapter_name: str) -> bool:
    factor = factors_of(layer)[0][adapter_name]
    return bool(getattr(factor, "weight", factor).requires_grad)


def _device(layer: LoraLayer) -> torch.device:
    """Where theta_d and P live: with the first adapted layer, or on the CPU for a model on the meta device."""
    device, _ = device_and_dtype(layer)
    return torch.device("cpu") if device is None or device.type == "meta" else device
