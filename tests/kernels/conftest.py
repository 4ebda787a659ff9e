"""The devices whose operators are tested; TRITON_INTERPRET=1 makes the CPU's Triton's."""

import pytest
import torch

from uniproj.kernels import backend


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def triton_device(device: str) -> str:
    if not backend(device).startswith("triton"):
        pytest.skip("needs TRITON_INTERPRET=1 or a GPU")
    return device
