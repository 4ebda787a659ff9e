"""A whole model on a GPU: the gradients of the CPU, and the tokens that it decodes."""

import copy

import pytest
import torch

from analysis.overhead.model import attach, parameters
from analysis.overhead.workloads import WORKLOADS, greedy

pytestmark = pytest.mark.gpu
WORK = WORKLOADS["tiny"]


@pytest.mark.parametrize("name", ["unilora", "vblora", "vera"])
def test_a_step_and_a_generation_are_those_of_the_cpu(name: str, device: torch.device) -> None:
    torch.manual_seed(0)
    here = attach(WORK.load(), WORK, name).eval()
    there = copy.deepcopy(here).to(device)
    losses, tokens = [], []
    for model, place in ((here, torch.device("cpu")), (there, device)):
        loss = model(**WORK.training_batch(place)).loss
        loss.backward()
        losses.append(loss.item())
        tokens.append(model.generate(**WORK.prompt(place), **greedy(6)).cpu())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for a, b in zip(parameters(there), parameters(here), strict=True):
        torch.testing.assert_close(a.grad.cpu(), b.grad, rtol=1e-3, atol=1e-3 * b.grad.abs().max().item())
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", ["unilora", "vblora"])
def test_a_static_cache_decodes_the_same_tokens_before_and_after_an_edit(name: str, device: torch.device) -> None:
    """With such a cache Transformers compiles each step for CUDA graphs on a GPU."""
    torch.manual_seed(0)
    model = attach(WORK.load(), WORK, name).eval().to(device)
    for _ in range(2):
        static = model.generate(**WORK.prompt(device), **greedy(6), cache_implementation="static")
        assert torch.equal(static, model.generate(**WORK.prompt(device), **greedy(6)))
        parameters(model)[0].data.mul_(-30)


def test_a_captured_call_sees_what_is_written_into_theta_d(gpu: torch.device) -> None:
    torch.manual_seed(0)
    model, inputs = attach(WORK.load(), WORK, "unilora").eval().to(gpu), WORK.prompt(gpu)
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(beside):
        for _ in range(3):
            model(**inputs, use_cache=False)
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = model(**inputs, use_cache=False).logits
    for factor in (1, -30):
        parameters(model)[0].data.mul_(factor)
        graph.replay()
        with torch.no_grad():
            torch.testing.assert_close(captured, model(**inputs, use_cache=False).logits)
