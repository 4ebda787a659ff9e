"""A small model with an adapter that a bank takes, and vectors for it."""

import torch
from peft import PeftModel, get_peft_model

from tests.tuner.models import base_model, config

D = 60


def adapted(kind: str = "llama", projection: str = "unilora", d: int | None = D, **fields) -> PeftModel:
    return get_peft_model(base_model(kind), config(kind, projection, d, **fields)).eval()


def vector(seed: int) -> torch.Tensor:
    return torch.randn(D, generator=torch.Generator().manual_seed(seed))
