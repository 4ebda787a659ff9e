"""Which implementation runs, and what is said where Triton is missing."""

import warnings

import pytest

import uniproj.kernels
from uniproj.kernels.dispatch import HAS_TRITON, _warn_once, backend


@pytest.fixture
def no_triton(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("uniproj.kernels.dispatch.HAS_TRITON", False)
    _warn_once.cache_clear()


def test_the_cpu_runs_torch(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert uniproj.kernels.backend is backend and backend() == backend("cpu") == "torch"


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


def test_triton_is_found_where_it_is_installed() -> None:
    assert HAS_TRITON
