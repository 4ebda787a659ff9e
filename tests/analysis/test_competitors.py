"""Every method of the kernel part computes P theta_d and P^T y of a P that is built here from its definition."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from analysis.overhead import kernel, memory, methods
from analysis.overhead.problem import SEED, Candidate, Entrant, Method, Problem
from analysis.overhead.shapes import Llama
from uniproj import LoRALayout

LAYOUT = LoRALayout.from_shapes(Llama(layers=2, hidden=16, intermediate=24, heads=4, kv_heads=2).all_linear(), 2)
D, d = LAYOUT.D, 29


@pytest.fixture
def problem() -> Problem:
    return Problem(LAYOUT, d, torch.device("cpu"))


def flat(output: object) -> Tensor:
    return torch.cat([part.reshape(-1) for part in output]) if isinstance(output, list) else torch.as_tensor(output)


def adjoint(method: Method) -> Tensor:
    found = method.adjoint(method.forward())
    return found[0] if isinstance(found, tuple) else found


def columns(method: Method, x: Tensor) -> Tensor:
    """P by its columns: the forward of every unit vector, put into the tensor that the method reads."""
    kept = x.detach().clone()
    parts = []
    for j in range(d):
        x.data.zero_()[j] = 1.0
        parts.append(flat(method.forward()).detach().double().clone())
    x.data.copy_(kept)
    return torch.stack(parts, 1)


def agrees(method: Method, P: Tensor, x: Tensor, y: Tensor) -> None:
    assert torch.allclose(flat(method.forward()).double(), P @ x.detach().double(), rtol=1e-5, atol=1e-5)
    assert torch.allclose(adjoint(method).double(), P.T @ y.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("candidate", methods.PEERS, ids=lambda c: c.name)
def test_pytorch_operators_on_one_partition(candidate: Candidate, problem: Problem) -> None:
    count = np.bincount(problem.index.numpy(), minlength=d)
    assert count.min() >= D // d and count.max() <= -(-D // d)
    P = torch.zeros(D, d, dtype=torch.float64)
    for i, j in enumerate(problem.index.tolist()):
        P[i, j] = count[j] ** -0.5
    agrees(candidate.build(problem), P, problem.x, problem.y)


def test_pefts_unilora_is_a_partition_of_all_modules(problem: Problem) -> None:
    method = methods.PEFT_UNILORA.build(problem)
    assert len(method.forward()) == 2 * len(LAYOUT.modules) and len(method.parameters[0]) == d
    P = columns(method, method.parameters[0])
    assert P.shape == (D, d) and torch.equal((P != 0).sum(1), torch.ones(D, dtype=torch.int64))
    assert torch.allclose(P.square().sum(0), torch.ones(d, dtype=torch.float64), atol=1e-6)
    agrees(method, P, method.parameters[0], problem.y)


@pytest.mark.parametrize("name", ["unilora", "fastfood"])
def test_uniprojs_own(name: str, problem: Problem) -> None:
    method = methods.candidate(name, 64).build(problem)
    agrees(method, methods.build(problem, name).to_dense(), method.parameters[0], problem.y)


def fastfood_by_definition() -> Tensor:
    """First D rows and d columns of the stacked H G Pi H B / sqrt(n D), from the same draws."""
    n, generator = 32, torch.Generator().manual_seed(SEED)
    blocks = -(-D // n)
    B = (2 * torch.randint(0, 2, (blocks, n), generator=generator) - 1).double()
    G = torch.randn(blocks, n, generator=generator).double()
    H = torch.from_numpy(hadamard(n)).double()
    eye = torch.eye(n, dtype=torch.float64)
    Pi = [eye[torch.randperm(n, generator=generator)] for _ in range(blocks)]
    stacked = [H @ torch.diag(G[b]) @ Pi[b] @ H @ torch.diag(B[b]) for b in range(blocks)]
    return torch.cat(stacked)[:D, :d] / (n * D) ** 0.5


def test_fastfood_with_the_butterfly(problem: Problem) -> None:
    agrees(methods.BUTTERFLY.build(problem), fastfood_by_definition(), problem.x, problem.y)


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_the_butterfly_is_the_hadamard_matrix(n: int) -> None:
    x = torch.randn(3, n)
    kept = x.clone()
    assert torch.allclose(methods.butterfly(x), x @ torch.from_numpy(hadamard(n)).float(), atol=1e-5)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("build", [methods.candidate("vblora", 48).build, methods.PEFT_VBLORA.build])
def test_vblora_is_linear_in_its_sub_vectors(build: Callable[[Problem], Method], problem: Problem) -> None:
    """theta_D is linear in these at fixed logits, so <y, theta_D> = <gradient, vectors>; logits get a gradient too."""
    method = build(problem)
    theta_D = flat(method.forward()).detach().double()
    gradients = method.adjoint(method.forward())
    assert len(theta_D) == D and len(gradients) == len(method.parameters)
    vectors = method.parameters[0].detach().double()
    assert torch.dot(theta_D, problem.y.double()) == pytest.approx(
        (gradients[0].double() * vectors).sum().item(), rel=1e-3
    )
    assert sum(t.numel() for t in method.parameters[1:]) == sum(g.numel() for g in gradients[1:]) > 0


def test_the_two_floors_copy_theta_D(problem: Problem) -> None:
    copy, clone = (candidate.build(problem) for candidate in methods.FLOORS)
    assert torch.equal(copy.forward(), problem.y) and torch.equal(clone.forward(), problem.y)
    assert copy.forward().data_ptr() == copy.forward().data_ptr() != problem.y.data_ptr()
    kept = clone.forward()
    assert clone.forward().data_ptr() != kept.data_ptr()


def test_memory_counts_each_storage_once() -> None:
    device = torch.device("cpu")
    before = memory.tensor_bytes(device)
    kept = torch.zeros(1000)
    views = [kept[:10], kept.view(10, 100)]
    assert memory.tensor_bytes(device) - before == 4000 and views
    with FakeTensorMode():
        traced = torch.zeros(1000)
    assert memory.tensor_bytes(device) - before == 4000 and traced.shape == (1000,)
    csr = torch.sparse_csr_tensor([0, 1, 2], [0, 1], [1.0, 1.0])
    assert memory.tensor_bytes(device) - before == 4000 + 3 * 8 + 2 * 8 + 2 * 4 and csr.shape == (2, 2)


def test_the_peak_sees_memory_that_is_gone() -> None:
    peak = memory.Peak(torch.device("cpu"))
    memory.give_back_at_once(True)
    try:
        before = peak.reset()
        torch.ones(25_000_000).sum()
        assert 90e6 < peak.read() - before < 130e6
    finally:
        memory.give_back_at_once(False)


def measured(monkeypatch, family: tuple[Candidate, ...]) -> dict[str, dict]:
    monkeypatch.setitem(kernel.ARCHITECTURES, "small", lambda: LAYOUT.shapes())
    monkeypatch.setitem(kernel.FAMILIES, "unilora", family)
    config = {"architecture": "small", "r": 2, "d": d, "rounds": 6, "family": "unilora", "device": "cpu"}
    return {row["method"]: row for row in kernel.measure(config)}


def test_one_method_that_fails_costs_no_others_result(monkeypatch) -> None:
    def broken(_: Problem) -> Method:
        raise RuntimeError("first line\nsecond line")

    def absent(_: Problem) -> Method:
        raise ImportError("No module named 'nothing'")

    own, *_ = kernel.FAMILIES["unilora"]
    family = (own, methods.PEERS[1], Candidate("broken", broken, 4), Candidate("absent", absent, 4))
    rows = measured(monkeypatch, (*family, Candidate("huge", methods.copy, 1e15)))
    assert list(rows) == ["copy", "clone", "unilora", "index_select", "broken", "absent", "huge"]
    assert rows["broken"]["note"] == "failed: RuntimeError: first line"
    assert rows["absent"]["note"] == "skipped: No module named 'nothing'"
    assert rows["huge"]["note"].startswith("skipped: needs about")
    for name in ("unilora", "index_select"):
        row = rows[name]
        assert row["D"] == D and row["both_per_copy_low"] <= row["both_per_copy"] <= row["both_per_copy_high"]
        # medians of one turn's times and of their sums, which no times of others can turn round
        assert row["both_seconds"] >= max(row["forward_seconds"], row["adjoint_seconds"])
    assert rows["index_select"]["bytes_per_coordinate"] == 4.0 and "both_per_ours" in rows["index_select"]
    assert "both_per_ours" not in rows["unilora"] and "both_per_copy" in rows["clone"]


def test_a_slow_method_is_called_once_and_not_in_turn(monkeypatch) -> None:
    calls: list[int] = []
    own, *_ = kernel.FAMILIES["unilora"]
    slow = Candidate("slow", lambda problem: Method(lambda: calls.append(1), lambda _: None), 4)
    monkeypatch.setattr(Entrant, "is_slow", property(lambda self: self.name == "slow"))
    row = measured(monkeypatch, (own, slow))["slow"]
    assert calls == [1] and "one call only" in row["note"] and "both_per_copy" not in row
