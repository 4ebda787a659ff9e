"""The tiny model and rows of the experiments' tests, and a real SLURM of one node that lives as long as its tests."""

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.experiments.conftest import config, model, runs, task  # noqa: F401


def _free_ports(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="package", autouse=True)
def slurm(tmp_path_factory) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("starting slurmctld, slurmd and munged needs root")
    root = tmp_path_factory.mktemp("slurm")
    command = [Path(__file__).with_name("setup.sh"), root, *_free_ports(2)]
    pipe = subprocess.PIPE
    # a session of its own: Ctrl-C reaches the tests, and their end ends the daemons
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    if server.stdout.readline().strip() != "ready":
        pytest.skip(f"SLURM could not be set up: {server.communicate()[1][-500:]}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(root / "slurm.conf"))
        yield
    server.communicate()
