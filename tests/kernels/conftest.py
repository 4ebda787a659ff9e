"""The devices whose operators are tested; TRITON_INTERPRET=1 makes the CPU's Triton's."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from uniproj.kernels import backend

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=DEVICES)
def compiling_device(request: pytest.FixtureRequest) -> str:
    """As `device`, for tests of what PyTorch makes of an operator, which Triton's interpreter leaves out."""
    return request.param


@pytest.fixture
def triton_device(device: str) -> str:
    if not backend(device).startswith("triton"):
        pytest.skip("needs TRITON_INTERPRET=1 or a GPU")
    return device


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets PyTorch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton's interpreter is slow, and shows the numbers of the kernels: only tests that take a device run in it."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        here = Path(__file__).parent
        items[:] = [i for i in items if i.path.parent != here or "device" in getattr(i, "fixturenames", ())]
