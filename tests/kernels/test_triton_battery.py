"""The battery over projections whose kernels run in Triton, in its interpreter or on a GPU."""

import pytest

from uniproj import LoRALayout
from uniproj.testing import BATTERY, check_projection, sample

# what the interpreter can show, and is not slow at
NUMBERS = {"adjoint_dot_test", "dense_equals_matrix_free", "autograd_equals_adjoint"}

LAYOUT = LoRALayout.from_shapes({f"h.{i}.{m}": (6, 4) for i in (2, 10) for m in ("q", "v")}, r=1)


@pytest.mark.parametrize(
    "name", ["unilora", "unilora_local", "unilora_sparse", "vera", "tied_lora", "vblora", "fastfood"]
)
def test_battery(name: str, triton_device: str) -> None:
    P = sample(name, LAYOUT, 10).to(triton_device)
    assert check_projection(P, only=NUMBERS if triton_device == "cpu" else BATTERY.keys() - {"gradcheck"})
