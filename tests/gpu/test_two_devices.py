"""A P on one GPU while another one is the current device."""

import pytest
import torch

from tests.gpu.cases import CASES, case, drawn

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("name", "i"), CASES, ids=str)
def test_P_on_the_second_while_the_first_is_current(name: str, i: int, gpu: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    found = []
    for place in ("cuda:0", "cuda:1"):
        P = case(name, i, gpu).to(place)
        x, y = drawn(P.d).float().to(place).requires_grad_(), drawn(P.D).float().to(place)
        theta_D = P(x)
        assert theta_D.device == torch.device(place) and torch.cuda.current_device() == 0
        found.append([theta_D.detach().cpu(), torch.autograd.grad(theta_D, x, y)[0].cpu()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
