"""The Triton kernels of shared matrices against the definition; with TRITON_INTERPRET=1, or on a GPU."""

import pytest
import torch

from tests.kernels.test_shared import CASES, F64, case, definition, operators
from uniproj.kernels import backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    backend() != "triton-interpreter" and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU"
)


@pytest.mark.parametrize("which", range(len(CASES)))
@pytest.mark.parametrize(("dtype", "eps"), [(F64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_kernels_follow_the_definition(which: int, dtype: torch.dtype, eps: float) -> None:
    y, matrix, scale, table, sizes = case(which, 2, dtype)
    there = [t.to(DEVICE) for t in (y, matrix, scale, table)]
    found = operators(*there, sizes, dtype)
    for ours, theirs in zip(found, definition(which, y, matrix, scale), strict=True):
        assert ours.dtype == dtype and ours.device.type == DEVICE
        assert (ours.cpu().double() - theirs).abs().max() <= eps * theirs.abs().max()
    again = operators(*there, sizes, dtype)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
