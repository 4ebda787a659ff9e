"""A small model with an adapter that a bank takes, and vectors for it."""

import torch
from peft import PeftModel, get_peft_model

from tests.tuner.models import base_model, config

D = 60


def adapted(**fields) -> PeftModel:
    return get_peft_model(base_model("llama"), config("llama", d=fields.pop("d", D), **fields)).eval()


def vector(seed: int) -> torch.Tensor:
    return torch.randn(D, generator=torch.Generator().manual_seed(seed))
