"""A base model as far as an adapter needs it: its linear modules, or also their weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
import transformers
from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from uniproj.errors import AdapterError
from uniproj.tuner.quantised import BaseWeights

_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def weights_of(base: nn.Module, names: Mapping[str, str]) -> BaseWeights:
    """W (out, in) of modules of a base model; names: theirs in a layout -> in the base."""
    return BaseWeights({name: base.get_submodule(module) for name, module in names.items()})


def load(base: str | nn.Module, config: PeftConfig, weights: bool) -> nn.Module:
    """The base model of an adapter, by Transformers' class for its task; without weights it lies on the meta device.

    base: a folder or a name on the hub, or the model itself. Raises AdapterError for one that Transformers cannot load.
    """
    if isinstance(base, nn.Module):
        return base
    try:
        found = transformers.AutoConfig.from_pretrained(base)
        named = getattr(transformers, (found.architectures or ["AutoModel"])[0], transformers.AutoModel)
        task = getattr(config.task_type, "value", config.task_type)
        cls = getattr(transformers, _CLASSES[task]) if task in _CLASSES else named
        if weights:
            return cls.from_pretrained(base)
        with torch.device("meta"):
            return cls.from_config(found) if task in _CLASSES or named is transformers.AutoModel else cls(found)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{base}: must be a model that Transformers loads, got {error}. Check the name.") from error


def linear_modules(base: nn.Module, config: PeftConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of the modules that PEFT adapts for this configuration, in their order of registration.

    Raises AdapterError where there are none.
    """
    found: dict[str, tuple[int, int]] = {}
    for name, module in base.named_modules():
        if check_target_module_exists(config, name):
            if isinstance(module, nn.Linear):
                found[name] = (module.out_features, module.in_features)
            elif isinstance(module, Conv1D):
                found[name] = (module.nf, module.nx)
    if not found:
        raise AdapterError(
            f"base: must have linear modules called {config.target_modules}, got a {type(base).__name__} without any. "
            "Pass the base model that the adapter was trained on."
        )
    return found


def adapted(base: str | nn.Module, config: PeftConfig) -> int:
    """How many weights the modules have that PEFT adapts for this configuration."""
    return sum(out * in_ for out, in_ in linear_modules(load(base, config, weights=False), config).values())


def bare(shapes: Mapping[str, tuple[int, int]]) -> nn.Module:
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
    """Without PEFT's warnings about layers whose weights are not there."""
    return warnings.catch_warnings(action="ignore")
