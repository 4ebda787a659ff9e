"""The devices whose operators are tested; TRITON_INTERPRET=1 makes the CPU's Triton's."""

import os

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Triton's interpreter is slow, and shows the numbers of the kernels: only tests that take a device run in it."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    here = [item for item in items if item.path.is_relative_to(os.path.dirname(__file__))]
    others = [item for item in here if "device" not in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]
