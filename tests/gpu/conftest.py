"""The GPU whose products are tested; `--device cpu` rehearses the tests without one."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", choices=["cuda", "cpu"], help="where the tests run (cuda)")


@pytest.fixture(autouse=True)
def _plain_pytorch_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba would compile its loops for longer than the tests take."""
    monkeypatch.setattr("uniproj.kernels.dispatch.HAS_NUMBA", False)
    monkeypatch.setattr("uniproj.kernels.dispatch._warn_once", lambda missing: None)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    # the option is there where these tests alone are asked for
    kind = request.config.getoption("--device", "cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU with CUDA")
    return torch.device(kind)


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """As `device`, for what nothing can stand in for."""
    if device.type != "cuda":
        pytest.skip("needs a GPU with CUDA")
    return device
