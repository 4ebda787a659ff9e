"""A vLLM server whose models are the users of a bank, as somebody starts it who has installed uniproj beside vLLM."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch

from tests.engines.engine import ENGINES, ENVIRONMENTS, ROOT, new_environment, pip

_STARTS = 600  # seconds
_ANSWERS = 600


def install() -> Path:
    """The Python of an environment with uniproj over the engine's own, in which uniproj is not installed."""
    engine, python = ENGINES["vllm"].install(), new_environment(ENVIRONMENTS / "vllm_bank")
    (below,), (site,) = (each.parents[1].glob("lib/python*/site-packages") for each in (engine, python))
    (site / "engine.pth").write_text(str(below))
    # what is below stays: uniproj asks for no other torch and transformers
    pip(python, "install", str(ROOT))
    return python


@dataclass(frozen=True)
class Server:
    """A running one; temporary: where it keeps what it exports."""

    url: str
    temporary: Path

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer to a request, or the status of a refusal."""
        head = {"Content-Type": "application/json"}
        try:
            with urlopen(Request(self.url + path, json.dumps(body).encode(), head), timeout=_ANSWERS) as answer:
                text = answer.read()
        except HTTPError as refused:
            return refused.code
        return json.loads(text) if text.startswith(b"{") else text.decode()

    def complete(self, users: Sequence[str], prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """The tokens of each user's prompt, all of which are asked at once."""

        def tokens(user: str, prompt: Sequence[int]) -> list[int]:
            length = {"max_tokens": new_tokens, "min_tokens": new_tokens}
            body = {"model": user, "prompt": list(prompt), "temperature": 0, "return_token_ids": True, **length}
            return self.post("/v1/completions", body)["choices"][0]["token_ids"]

        with ThreadPoolExecutor(len(users)) as threads:
            return list(threads.map(tokens, users, prompts))


@contextmanager
def serving(base: Path, bank: Path, folder: Path, *options: object) -> Iterator[Server]:
    """A server of a base and a bank, with PyTorch's threads of this process; folder: for its log and files."""
    port, temporary = _free_port(), folder / "temporary"
    temporary.mkdir()
    # `vllm serve` looks for a package named vllm, which that of the CPU is not
    command = [install(), "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", base, "--port", port, *options]
    environment = {
        **os.environ,
        **ENGINES["vllm"].environment,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "",
        "TMPDIR": str(temporary),
        "UNIPROJ_BANK": str(bank),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }
    log = folder / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen([*map(str, command)], cwd=folder, env=environment, stdout=file, stderr=file)
    try:
        server = Server(f"http://127.0.0.1:{port}", temporary)
        _wait(server, process, log)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def _wait(server: Server, process: subprocess.Popen, log: Path) -> None:
    for _ in range(_STARTS):
        assert process.poll() is None, log.read_text()[-8000:]
        try:
            with urlopen(f"{server.url}/health", timeout=10):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"no server after {_STARTS} s: {log.read_text()[-8000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
