"""No product makes the processor wait for the GPU, and a CUDA graph records it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.gpu.cases import CASES, case, drawn

pytestmark = pytest.mark.gpu
each_P = pytest.mark.parametrize(("name", "i"), CASES, ids=str)


@contextmanager
def _waits_refused(device: torch.device) -> Iterator[None]:
    """Whatever waits for the GPU is an error; there is nothing to wait for on the CPU."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@each_P
def test_a_product_its_adjoint_and_its_backward_wait_for_nothing(name: str, i: int, device: torch.device) -> None:
    P = case(name, i, device).to(device)
    x, y = drawn(P.d).float().to(device).requires_grad_(), drawn(P.D).float().to(device)

    def work() -> list[torch.Tensor]:
        with torch.no_grad():
            products = [P(x), P.adjoint(y)]
        return [*products, *torch.autograd.grad(P(x), [x, *P.parameters()], y)]

    expected = work()  # kernels are loaded and indices made at the first call
    with _waits_refused(device):
        found = work()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@each_P
def test_a_graph_replays_a_product_and_its_adjoint_on_new_numbers(name: str, i: int, gpu: torch.device) -> None:
    P = case(name, i, gpu).to(gpu)
    x, y = drawn(P.d).float().to(gpu).requires_grad_(), drawn(P.D).float().to(gpu)
    trained = [x, *P.parameters()]

    def work() -> list[torch.Tensor]:
        theta_D = P(x)
        return [theta_D.detach(), *torch.autograd.grad(theta_D, trained, y)]

    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for each in (x, y):
                each.copy_(torch.randn(each.shape, generator=generator))
        graph.replay()
        for a, b in zip(found, work(), strict=True):
            torch.testing.assert_close(a, b)
