"""A forked process projects, trains and generates as its parent does: servers fork after loading."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.bank.models import adapted, vector
from tests.forked import found_in_child
from tests.tuner.models import batch
from uniproj import LoRALayout, Projection, build
from uniproj.bank import AdapterBank
from uniproj.kernels import dispatch

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="it is about the loops and threads of the CPU"
    ),
    pytest.mark.skipif(
        torch.version.cuda is not None, reason="PyTorch with CUDA refuses a backward in a forked process"
    ),
]
LAYOUT = LoRALayout.from_shapes({f"m{k}.q": (1024, 1024) for k in range(32)}, 16)  # D = 2^20: worth several threads


@pytest.fixture(autouse=True)
def several_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.ones(2**20).sum()  # starts PyTorch's own
    yield
    torch.set_num_threads(before)


def passes(P: Projection) -> list[bytes]:
    """Forward, gradient and adjoint, as bytes: no tensor shares its memory between the processes."""
    x = torch.linspace(-1, 1, P.d).requires_grad_()
    y = P(x)
    y.square().sum().backward()
    return [_bytes(y), _bytes(x.grad), _bytes(P.adjoint(y.detach()))]


def _bytes(x: Tensor) -> bytes:
    return x.detach().numpy().tobytes()


def _sample(name: str) -> Projection:
    return build(name, layout=LAYOUT, d=4096 if name == "unilora" else None, seed=3)


@pytest.mark.parametrize(("name", "numba"), [("unilora", True), ("unilora", False), ("vera", True)])
def test_a_forked_process_has_the_same_bits(name: str, numba: bool, monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "HAS_NUMBA", numba and dispatch.HAS_NUMBA)
    monkeypatch.setattr(dispatch, "_warn_once", lambda missing: None)
    P = _sample(name)
    expected = passes(P)
    for _ in range(2):
        assert found_in_child(lambda: passes(P)) == expected
        assert found_in_child(lambda: passes(_sample(name))) == expected
        assert passes(P) == expected  # the parent goes on, on its threads
    assert found_in_child(lambda: found_in_child(lambda: passes(P))) == expected
    assert torch.get_num_threads() == 2


def test_processes_are_forked_while_threads_project() -> None:
    P, stop = _sample("unilora"), threading.Event()
    expected = passes(P)

    def project() -> None:
        while not stop.is_set():
            P(torch.ones(P.d))

    threads = [threading.Thread(target=project) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            assert found_in_child(lambda: passes(P)) == expected
    finally:
        stop.set()
        for thread in threads:
            thread.join()


_FIRST = """
import os, sys, threading, time
import torch
from uniproj import build

P = build("unilora", 2**16, d=64, seed=0)
thread = threading.Thread(target=P, args=(torch.ones(64),))
thread.start()
while "numba" not in sys.modules:
    time.sleep(0.001)
if (pid := os.fork()) == 0:
    P(torch.ones(64))
    os._exit(0)
thread.join()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_process_is_forked_while_a_thread_loads_the_loops() -> None:
    started = subprocess.Popen([sys.executable, "-c", _FIRST], start_new_session=True)
    try:
        assert started.wait(120) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)  # with its child
        started.wait()


_P: Projection


def _in_pool(_: int) -> list[bytes]:
    return passes(_P)


def test_a_pool_of_forked_processes_projects() -> None:
    global _P
    _P = _sample("vera")
    expected = passes(_P)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(_in_pool, range(4)).get(120) == [expected] * 4


class _Rows(torch.utils.data.Dataset):
    def __init__(self, P: Projection):
        self.P = P

    def __len__(self) -> int:
        return 2

    def __getitem__(self, k: int) -> bytes:
        return _bytes(self.P(torch.full((self.P.d,), float(k))))


def test_workers_of_a_data_loader_project() -> None:
    P = _sample("unilora")
    rows = _Rows(P)
    expected = [[rows[k]] for k in range(2)]
    loader = torch.utils.data.DataLoader(
        rows, num_workers=2, multiprocessing_context="fork", collate_fn=list, timeout=120
    )
    assert list(loader) == expected


def test_a_server_forks_after_loading(tmp_path: Path) -> None:
    model, ids = adapted().eval(), batch("llama")["input_ids"]
    bank = AdapterBank.create(tmp_path / "bank", model)
    bank.add("mine", vector(1))

    def serve() -> list[int]:
        bank.select(model, "mine")
        return model.generate(input_ids=ids, max_new_tokens=4).flatten().tolist()

    tokens = serve()
    assert found_in_child(serve) == found_in_child(serve) == tokens == serve()
