"""Which implementation runs, and what is said where Triton or Numba is missing."""

import gc
import importlib.metadata
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import uniproj
import uniproj.kernels
from uniproj.kernels import dispatch
from uniproj.kernels.dispatch import HAS_NUMBA, HAS_TRITON, _warn_once, backend

needs_numba = pytest.mark.skipif(backend() != "numba", reason="Triton's interpreter runs everything")


@pytest.fixture
def no_triton(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("uniproj.kernels.dispatch.HAS_TRITON", False)
    _warn_once.cache_clear()


def test_the_cpu_runs_numba_where_it_is_installed(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert uniproj.kernels.backend is backend and backend() == backend("cpu") == ("numba" if HAS_NUMBA else "torch")
    assert backend("meta") == "torch"


def test_a_cpu_without_numba_says_so_once(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("uniproj.kernels.dispatch.HAS_NUMBA", False)
    _warn_once.cache_clear()
    with pytest.warns(UserWarning, match="pip install numba"):
        assert backend("cpu") == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend("cpu") == "torch"


def test_a_gpu_without_triton_says_so_once(no_triton) -> None:
    with pytest.warns(UserWarning, match="pip install triton"):
        assert backend("cuda:0") == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend("cuda:0") == "torch"


def test_triton_runs_a_gpu_and_its_interpreter_everything(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("uniproj.kernels.dispatch.HAS_TRITON", True)
    assert backend("cuda") == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend("cpu") == "triton-interpreter"


@needs_numba
@pytest.mark.parametrize("name", ["unilora", "unilora_local", "vera", "tied_lora"])
def test_numba_and_torch_agree(name: str, monkeypatch) -> None:
    layout = uniproj.LoRALayout.from_shapes({"layers.0.q": (24, 40), "layers.1.q": (40, 16), "layers.2.q": (7, 40)}, 3)
    P = uniproj.build(name, layout=layout, d=50 if uniproj.get(name).free_d else None)
    x, y = torch.randn(2, P.d, dtype=torch.float64), torch.randn(2, P.D, dtype=torch.float64)
    forward, adjoint = P(x), P.adjoint(y)
    monkeypatch.setattr("uniproj.kernels.dispatch.HAS_NUMBA", False)
    plain = P.rebuild()
    assert torch.equal(plain(x), forward)
    torch.testing.assert_close(plain.adjoint(y), adjoint)


@needs_numba
def test_numba_is_imported_at_the_first_use_and_leaves_pytorchs_number_of_threads_alone() -> None:
    code = (
        "import sys, torch, uniproj; torch.set_num_threads(1); P = uniproj.build('unilora', D=4000, d=30); "
        "before = 'numba' in sys.modules; P(torch.ones(30)); "
        "print(before, 'numba' in sys.modules, torch.get_num_threads())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "True", "1"]


@needs_numba
@pytest.mark.parametrize("assignment", ["balanced", "peft"])
def test_tiles_are_made_once_and_go_with_P(assignment: str, monkeypatch) -> None:
    from uniproj.kernels import partition_numba

    made = []
    monkeypatch.setattr(
        partition_numba, "tile", lambda index, d, tile=partition_numba.tile: made.append(d) or tile(index, d)
    )
    P = uniproj.build("unilora", D=40_000, d=30, assignment=assignment)
    gc.collect()  # or those of earlier tests would go at any moment
    kept = len(partition_numba._tiles)
    P.checksum(), P.to_dense()
    assert not made
    x = torch.randn(30, requires_grad=True)
    for way in (P, torch.compile(P, backend="aot_eager", fullgraph=True), torch.export.export(P, (x,)).module()):
        way(x).sum().backward()
    assert made == [30] and len(partition_numba._tiles) == kept + 1
    assert all(value.dtype != torch.uint32 for value in P.constants().values())
    again = P.rebuild()
    again(x)
    assert len(partition_numba._tiles) == kept + 2
    del again
    assert len(partition_numba._tiles) == kept + 1


def test_both_are_found_where_they_are_installed() -> None:
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    assert ("triton" in installed, "numba" in installed) == (HAS_TRITON, HAS_NUMBA)


SEVENS = """
import torch

RUNS_ON = ("cpu",)


def deal_out(x, by_row, by_position, groups, tables, size, dtype):
    return torch.full((len(x), size[0]), 7, dtype=dtype)
"""


def test_a_backend_is_added_by_one_file(tmp_path, monkeypatch) -> None:
    (tmp_path / "partition_sevens.py").write_text(SEVENS)
    before = backend("cpu"), backend("meta")
    remembered = (dispatch._added, dispatch._file, dispatch._namesake)
    with monkeypatch.context() as with_sevens:
        with_sevens.setattr(uniproj.kernels, "__path__", [*uniproj.kernels.__path__, str(tmp_path)])
        _forget(remembered)
        dealt = uniproj.build("unilora", D=100, d=9)
        given = uniproj.build("unilora", D=100, d=9, assignment="peft")
        x, y = torch.randn(9, dtype=torch.float64, requires_grad=True), torch.randn(100, dtype=torch.float64)
        assert (dealt(x) == 7).all()
        # what the file lacks is computed as before, gradients included
        (grad,) = torch.autograd.grad(dealt(x), x, y)
        torch.testing.assert_close(grad, y @ dealt.to_dense())
        torch.testing.assert_close(given(x), given.to_dense() @ x)
        assert (backend("cpu"), backend("meta")) == ("sevens", before[1])
    _forget(remembered)
    assert backend("cpu") == before[0]


def _forget(remembered) -> None:
    sys.modules.pop("uniproj.kernels.partition_sevens", None)
    for function in remembered:
        function.cache_clear()


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device: elsewhere it would read the memory of another."""
    current = [0]

    @contextmanager
    def device_index(index: int) -> Iterator[None]:
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.accelerator, "device_index", device_index)
    assert dispatch.run(lambda: current[-1], torch.device("cuda:1")) == 1 and current == [0]
    assert dispatch.run(lambda: current[-1], torch.device("cpu")) == 0
