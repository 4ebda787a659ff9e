"""The battery over projections whose kernels run in Triton, in its interpreter or on a GPU."""

import pytest
import torch

from uniproj import LoRALayout
from uniproj.kernels import backend
from uniproj.testing import BATTERY, check_projection, sample

pytestmark = pytest.mark.skipif(
    backend() != "triton-interpreter" and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU"
)
LAYOUT = LoRALayout.from_shapes({f"h.{i}.{m}": (12, 8) for i in (2, 10) for m in ("q", "v")}, r=2)


@pytest.mark.parametrize(
    "name", ["unilora", "unilora_local", "unilora_sparse", "vera", "tied_lora", "vblora", "fastfood"]
)
def test_battery(name: str) -> None:
    P = sample(name, LAYOUT, 20)
    assert check_projection(P.cuda() if torch.cuda.is_available() else P, only=set(BATTERY) - {"gradcheck"})


def test_backend_names_the_interpreter_or_the_gpu() -> None:
    assert backend("cuda" if torch.cuda.is_available() else "cpu") in ("triton", "triton-interpreter")
