"""Inductor compiles a product with what follows it into one graph, forward and backward."""

import pytest
import torch

from tests.gpu.cases import case, drawn

pytestmark = pytest.mark.gpu
# one for each kind of operator: Inductor takes seconds for each
KINDS = ("unilora", "vblora", "vera", "fastfood", "lora_xs")


@pytest.mark.parametrize("name", KINDS)
def test_one_graph_gives_the_numbers_of_eager_mode(name: str, device: torch.device) -> None:
    P = case(name, 0, device).to(device)
    x, y = drawn(P.d).float().to(device).requires_grad_(), drawn(P.D).float().to(device)

    def work(theta_d: torch.Tensor) -> torch.Tensor:
        return (P(theta_d) * y).sin()

    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(work, fullgraph=True, backend=backend)
    for a, b in zip(*([f(x), *torch.autograd.grad(f(x).sum(), x)] for f in (compiled, work)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
