"""Base models by name (packaged, a local folder, GGUF, the hub), and the three families by which runs train them."""

from experiments.models import trust
from experiments.models.causal import CausalModel
from experiments.models.family import Family, adapted_layout, adapted_shapes, family_of
from experiments.models.pretrained import (
    PACKAGED,
    QUANTIZED,
    BaseModel,
    load_causal,
    load_classifier,
    load_image_classifier,
    load_image_processor,
    load_tokenizer,
    location,
    model_config,
    target_modules,
    unloaded,
)
from experiments.models.trust import trust_remote_code, trusts_remote_code

__all__ = [
    "PACKAGED", "QUANTIZED", "BaseModel", "CausalModel", "Family", "adapted_layout", "adapted_shapes", "family_of",
    "load_causal", "load_classifier", "load_image_classifier", "load_image_processor", "load_tokenizer", "location",
    "model_config", "target_modules", "trust", "trust_remote_code", "trusts_remote_code", "unloaded",
]  # fmt: skip
