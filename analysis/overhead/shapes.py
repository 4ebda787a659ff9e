"""The (out_features, in_features) of every adapted module of published architectures, and of layouts that grow."""

from __future__ import annotations

import math
from dataclasses import dataclass

from uniproj import LoRALayout

Shapes = dict[str, tuple[int, int]]
# PEFT's defaults of VB-LoRA: how many sub-vectors, and their length
VECTORS, LENGTH = 256, 256


@dataclass(frozen=True)
class Llama:
    """The numbers of a Llama's config.json that decide the shapes of its linear layers."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int

    def all_linear(self) -> Shapes:
        """Every linear layer but the language-model head."""
        kv = self.hidden // self.heads * self.kv_heads
        block = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        return {f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in block.items()}


LLAMA_2_7B = Llama(layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32)
LLAMA_31_8B = Llama(layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8)
LLAMA_32_3B = Llama(layers=28, hidden=3072, intermediate=8192, heads=24, kv_heads=8)
LLAMA_31_405B = Llama(layers=126, hidden=16384, intermediate=53248, heads=128, kv_heads=8)
TINY = Llama(layers=1, hidden=32, intermediate=64, heads=4, kv_heads=2)

GROWTH_RANK = 4
# hidden / layers is 128 in the 7B and 8B models, 130 in the 405B one
_HIDDEN_PER_LAYER = 128


def minilm_query_value() -> Shapes:
    """The modules of the comparison on all-MiniLM-L6-v2: 6 layers of width 384."""
    return {f"layer.{i}.attention.self.{name}": (384, 384) for i in range(6) for name in ("query", "value")}


def roberta_large_query_value() -> Shapes:
    """The modules that Uni-LoRA's paper adapts on GLUE: 24 layers of width 1024."""
    return {f"layer.{i}.attention.self.{name}": (1024, 1024) for i in range(24) for name in ("query", "value")}


def growing(D: float) -> LoRALayout:
    """All linear layers at r = 4 of the Llama-like model whose D is nearest to a wanted one.

    L layers of width 128 L and inner width 3 * 128 L give D = 4 L (4 * 2 + 3 * 4) 128 L = 10,240 L^2.
    """
    layers = max(1, round((D / (80 * _HIDDEN_PER_LAYER)) ** 0.5))
    hidden = _HIDDEN_PER_LAYER * layers
    model = Llama(layers, hidden, 3 * hidden, heads=layers, kv_heads=layers)
    return LoRALayout.from_shapes(model.all_linear(), GROWTH_RANK)


def sub_vectors(layout: LoRALayout) -> dict[str, int]:
    """One size of VB-LoRA's sub-vectors for uniproj and PEFT alike.

    num_vectors h <= 256 and vector_length b <= 256: b divides every size, and they have at most D / 4 numbers.
    """
    common = math.gcd(*[size for shape in layout.shapes().values() for size in shape])
    b = max(n for n in range(1, min(common, LENGTH) + 1) if common % n == 0)
    return {"num_vectors": max(2, min(VECTORS, layout.D // (4 * b))), "vector_length": b}
