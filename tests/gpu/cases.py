"""Every projection with every variant, on a layout whose blocks fill no program of a kernel evenly."""

import torch

from uniproj import LoRALayout, Projection, get, names
from uniproj.testing import sample

CASES = [(name, i) for name in names() for i in range(len(get(name).variants))]
SMALL, LARGE = 1, 12


def case(name: str, i: int, device: torch.device) -> Projection:
    """P on the CPU: of one size for a GPU, of a smaller one for a rehearsal."""
    scale = LARGE if device.type == "cuda" else SMALL
    shapes = {f"h.{k}.{m}": (scale * out, scale * 20) for k in range(2) for m, out in (("q", 12), ("v", 8))}
    return sample(name, LoRALayout.from_shapes(shapes, 3), 33 * scale, seed=5, **get(name).variants[i])


def drawn(*shape: int) -> torch.Tensor:
    """Normal numbers in float64, the same for the same shape."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))
