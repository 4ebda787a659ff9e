"""What the numbers of an adapter belong to, as one small tensor beside them: it goes wherever they are copied."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

from uniproj.adapters.header import Header

_BYTES = 4


def encode(header: Header) -> Tensor:
    """(entries of `Header.identity`, 4) float32: of each entry the first 4 bytes of the SHA-256 of its JSON.

    Whole numbers below 256, held as floats: averages over equal adapters, half precision, and code that takes every
    tensor of an adapter for trained numbers leave them as they are.
    """
    digests = [hashlib.sha256(json.dumps(v, sort_keys=True).encode()).digest() for v in header.identity.values()]
    return torch.tensor([list(digest[:_BYTES]) for digest in digests], dtype=torch.float32, device="cpu")


def difference(found: Tensor, header: Header) -> str | None:
    """The first entry of its identity in which `header` is not that of numbers with the tensor `found`, or None.

    As a clause, like `Header.difference`.
    """
    own = encode(header)
    if found.shape != own.shape:
        return f"the identity must be of shape {tuple(found.shape)}, got {tuple(own.shape)}"
    same = (found.detach().cpu().float().round() == own).all(1).tolist()
    values = [item for item, is_same in zip(header.identity.items(), same, strict=True) if not is_same]
    return f"{values[0][0]} must be another, got {json.dumps(values[0][1])[:80]}" if values else None
