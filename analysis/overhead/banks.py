"""One size of VB-LoRA's bank for uniproj and PEFT alike."""

from __future__ import annotations

import math

from uniproj import LoRALayout

# PEFT's defaults
VECTORS, LENGTH = 256, 256


def bank(layout: LoRALayout) -> dict[str, int]:
    """num_vectors h <= 256 and vector_length b <= 256: b divides every size, and the bank has at most D / 4 numbers."""
    common = math.gcd(*[size for shape in layout.shapes().values() for size in shape])
    b = max(n for n in range(1, min(common, LENGTH) + 1) if common % n == 0)
    return {"num_vectors": max(2, min(VECTORS, layout.D // (4 * b))), "vector_length": b}
