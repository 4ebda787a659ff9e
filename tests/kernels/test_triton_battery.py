"""The battery over projections whose kernels run in Triton, in its interpreter or on a GPU."""

import pytest

from uniproj import LoRALayout
from uniproj.testing import BATTERY, check_projection, sample

LAYOUT = LoRALayout.from_shapes({f"h.{i}.{m}": (12, 8) for i in (2, 10) for m in ("q", "v")}, r=2)


@pytest.mark.parametrize(
    "name", ["unilora", "unilora_local", "unilora_sparse", "vera", "tied_lora", "vblora", "fastfood"]
)
def test_battery(name: str, triton_device: str) -> None:
    P = sample(name, LAYOUT, 20).to(triton_device)
    assert check_projection(P, only=set(BATTERY) - {"gradcheck"})
