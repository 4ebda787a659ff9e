"""GGUF in half the bytes."""

from __future__ import annotations

import torch

from uniproj.exchange.formats.gguf import GGUFFormat
from uniproj.exchange.registry import register


@register("gguf_f16")
class GGUFHalfFormat(GGUFFormat):
    """Rounded to float16, once."""

    dtype = torch.float16
