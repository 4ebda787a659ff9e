"""One thread, quiet libraries, our projections alone, and Hypothesis profiles (`thorough` draws more, and anew)."""

import gc
import importlib.metadata
import os
import signal
import warnings
from collections.abc import Iterator

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings
from packaging.version import Version
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from uniproj import plugins, registry

registry.names()
# in a forked process the end of an object that waits for a thread of its parent waits for ever: none is collected there
os.register_at_fork(before=gc.disable, after_in_parent=gc.enable)
torch.set_num_threads(1)
warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")

_quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("default", max_examples=8, deadline=None, derandomize=True, suppress_health_check=_quiet)
settings.register_profile("thorough", max_examples=100, deadline=None, suppress_health_check=_quiet)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    # or it would keep the group, whose end in a process that is forked by another thread waits for ever
    _clear_sharding_prop_cache()


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    # a projection that a test registers goes with it, and so do the handlers of a training that fails
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    monkeypatch.setattr(plugins, "_loaded", {})
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if torch.get_num_threads() != 1:  # a command that a test calls may take all cores
        torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Every training and every count of live tensors walks over all objects: those of the libraries are set aside."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before items are chosen by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notebooks are tests of the system. Triton's interpreter before 3.7 makes scalars of arrays with one entry, which
    NumPy refuses from 2.5 on.
    """
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker(pytest.mark.system)
    if os.environ.get("TRITON_INTERPRET") != "1" or Version(np.__version__) < Version("2.5"):
        return
    if (triton := Version(importlib.metadata.version("triton"))) < Version("3.7"):
        for item in items:
            item.add_marker(pytest.mark.skip(reason=f"the interpreter of Triton {triton} needs NumPy below 2.5"))
