"""Base models for adapters: with their weights, or only with the shapes of their modules."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from peft import PeftConfig
from peft.tuners.tuners_utils import replicate_layers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from uniproj.errors import AdapterError
from uniproj.exchange import architecture
from uniproj.format.places import Place
from uniproj.tuner.quantised import BaseWeights

_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def weights_of(found: Mapping[str, Place], names: Mapping[str, str]) -> BaseWeights:
    """W (out, in) of the modules of a layout.

    found: the places of a base model; names: {site in the layout: site there}. Raises AdapterError for a site that the
    base does not have.
    """
    if lacking := next((name for name in names.values() if name not in found), None):
        raise AdapterError(
            f"base: must have every module that the adapter was trained on, got none called {lacking}. Pass the "
            "adapter's own base."
        )
    return BaseWeights({name: found[now] for name, now in names.items()})


def load(base: str | nn.Module, config: PeftConfig, weights: bool, trust_remote_code: bool = False) -> nn.Module:
    """The base model of an adapter, by Transformers' class for its task, with the layers that `layer_replication`
    makes; weights=False leaves it on the meta device.

    base: a folder or a name on the hub, or the model itself. Raises AdapterError for one that Transformers cannot load,
    and for one that needs Python code of its own, which runs with `trust_remote_code` alone.
    """
    spans = getattr(config, "layer_replication", None)
    if isinstance(base, nn.Module):
        if not spans:
            return base
        own = (*base.parameters(), *base.buffers())
        model = copy.deepcopy(base, {id(tensor): tensor for tensor in own})  # of the same numbers
        _replicate(model, spans)
        return model
    with _loadable(base):
        found = _configuration(base, trust_remote_code)
        # a configuration may name a kernel on the hub, which is code, and no number here depends on it
        found._attn_implementation = "eager"
        task = getattr(config.task_type, "value", config.task_type)
        cls = getattr(transformers, _CLASSES[task]) if task in _CLASSES else _architecture(base, found)
        with torch.device("meta"), architecture.bounded(base):
            is_class = issubclass(cls, PreTrainedModel)
            model = cls(found) if is_class else cls.from_config(found, trust_remote_code=trust_remote_code)
        if weights:
            architecture.check_weights(base, model)
            model = cls.from_pretrained(base, config=found, trust_remote_code=trust_remote_code)
        if spans:
            _replicate(model, spans)
        return model


def configuration(base: str) -> PretrainedConfig:
    """That of a folder or a name on the hub. Raises AdapterError for one that Transformers cannot load by itself."""
    with _loadable(base):
        return _configuration(base, False)


def described(model: nn.Module | None) -> PretrainedConfig | None:
    """The configuration of a model of Transformers."""
    found = getattr(model, "config", None)
    return found if isinstance(found, PretrainedConfig) else None


def _configuration(base: str, trust_remote_code: bool) -> PretrainedConfig:
    architecture.check_sizes(transformers.PretrainedConfig.get_config_dict(base)[0], base)
    return transformers.AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)


@contextmanager
def _loadable(base: str) -> Iterator[None]:
    """Raises AdapterError for whatever a model class raises for a configuration that it cannot build."""
    try:
        yield
    except AdapterError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise AdapterError(
                f"{base}: must be a model of Transformers' own, got one that needs Python code which comes with it. "
                "Read that code, and if you trust it pass trust_remote_code=True (on the command line "
                "--trust-remote-code)."
            ) from error
        raise AdapterError(f"{base}: must be a model that Transformers loads, got {error}. Check the name.") from error


def _replicate(model: nn.Module, spans: Any) -> None:
    try:
        replicate_layers(model, spans)
    except (IndexError, ValueError) as error:
        raise AdapterError(
            f"base: must have the layers of layer_replication = {spans}, got {error}. Pass the adapter's own base."
        ) from error


def _architecture(base: str, found: PretrainedConfig) -> Any:
    """The model class that a configuration names; AutoModel where Transformers has none of the name."""
    named = found.architectures or ["AutoModel"]
    name = named[0] if isinstance(named, list) else named
    cls = getattr(transformers, name, transformers.AutoModel) if isinstance(name, str) else None
    if cls is transformers.AutoModel or (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        return cls
    raise AdapterError(
        f"{base}: architectures must begin with a model class such as LlamaForCausalLM, got {name!r}. Correct its "
        "config.json."
    )


def stand_in(shapes: Mapping[str, tuple[int, int]]) -> nn.Module:
    """Linear layers of these names and shapes (out, in), registered in this order; their weights take no memory."""
    root = nn.Module()
    for name, (out, in_) in shapes.items():
        with torch.device("meta"):
            layer = nn.Linear(in_, out, bias=False)
        layer.weight = nn.Parameter(torch.zeros(1).expand(out, in_), requires_grad=False)
        *parents, last = name.split(".")
        place = root
        for part in parents:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.add_module(last, layer)
    return root


def quietly() -> warnings.catch_warnings:
    """A context without PEFT's warnings about missing weights."""
    return warnings.catch_warnings(action="ignore")
