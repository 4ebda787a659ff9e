"""What the numbers of an adapter belong to, as one small tensor beside them: it goes wherever they are copied."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

from uniproj.errors import AdapterError
from uniproj.format.header import Header
from uniproj.format.keys import IDENTITY

_BYTES, _MIDDLE = 4, 127.5
_ROUNDING = 1.5  # of a weighted mean in bfloat16


def encode(header: Header) -> Tensor:
    """(entries of `Header.identity`, 5) float32: of each entry 255 and the first 4 bytes of the SHA-256 of its JSON,
    minus 127.5.

    Code that averages or adds adapters tensor by tensor scales these too: the first column tells by what factor.
    bfloat16 holds all of them exactly.
    """
    digests = [hashlib.sha256(json.dumps(v, sort_keys=True).encode()).digest() for v in header.identity.values()]
    return torch.tensor([[255, *digest[:_BYTES]] for digest in digests], dtype=torch.float32, device="cpu") - _MIDDLE


def difference(found: Tensor, header: Header) -> str | None:
    """The first entry of its identity in which `header` is not that of numbers with the tensor `found`, or None.

    As a clause, like `Header.difference`. A multiple of the tensor, and so a sum or mean over adapters of one P, is as
    the tensor itself. Raises AdapterError for one that is the multiple of no identity.
    """
    own = encode(header)
    if found.shape != own.shape:
        return f"the identity must be of shape {tuple(found.shape)}, got {tuple(own.shape)}"
    found = found.detach().cpu().double()
    found = found * (_MIDDLE / found[:, 0].mean())
    same = ((found - own).abs() < _ROUNDING).all(1).tolist()
    if not all(same) and not ((found % 1 - 0.5).abs() < 0.01).all():
        raise AdapterError(
            f"{IDENTITY}: must be as uniproj made it, or a multiple, got numbers that no longer tell a P: noise was "
            "added, or adapters of different P or scale were added or subtracted. Leave it out of such arithmetic: "
            "copy it from one of the adapters, when all of them have the same P and scale."
        )
    values = [item for item, is_same in zip(header.identity.items(), same, strict=True) if not is_same]
    return f"{values[0][0]} must be another, got {json.dumps(values[0][1])[:80]}" if values else None
