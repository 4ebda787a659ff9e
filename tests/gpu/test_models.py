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
