"""The Triton kernels of top-k mixtures against the definition; with TRITON_INTERPRET=1, or on a GPU."""

import pytest
import torch

from tests.kernels.test_topk import F64, SHAPES, case, definition, operators
from uniproj.kernels import backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    backend() != "triton-interpreter" and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU"
)


@pytest.mark.parametrize("shape", SHAPES[:4])
@pytest.mark.parametrize(("dtype", "eps"), [(F64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_kernels_follow_the_definition(shape: tuple[int, ...], dtype: torch.dtype, eps: float) -> None:
    inputs = case(*shape, dtype=dtype)
    found = operators(*(t.to(DEVICE) for t in inputs), dtype)
    for ours, theirs in zip(found, definition(*inputs), strict=True):
        assert ours.dtype == dtype and ours.device.type == DEVICE
        assert (ours.cpu().double() - theirs).abs().max() <= eps * theirs.abs().max()
    again = operators(*(t.to(DEVICE) for t in inputs), dtype)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
