"""The users of a bank as models of a vLLM server: a request for the model "ada" is answered with ada's adapter.

    UNIPROJ_BANK=users VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --enable-lora --max-lora-rank 8

vLLM calls `register` in each of its processes, as an entry point of its group vllm.general_plugins; where UNIPROJ_BANK
is not set, that does nothing. Source: vLLM 0.32, `vllm.plugins`, `vllm.lora.resolver` and
`vllm.entrypoints.openai.models`.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import TYPE_CHECKING

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from uniproj.errors import AdapterError

if TYPE_CHECKING:
    from uniproj.exchange import Adapter


def register() -> None:
    """Let vLLM find the users of the bank that UNIPROJ_BANK names. Raises AdapterError for a folder that is no bank."""
    if folder := os.environ.get("UNIPROJ_BANK"):
        LoRAResolverRegistry.register_resolver("uniproj", BankResolver(folder))


class BankResolver(LoRAResolver):
    """Writes a user's adapter for vLLM when the server first asks for it, to a folder that goes with the server.

    A server asks once for a name, and again after /v1/unload_lora_adapter. Other numbers get another path, by which
    vLLM tells what it has cached of the old ones.
    """

    def __init__(self, folder: str | Path):
        # PEFT takes seconds, which a server without a bank need not wait
        from uniproj.bank import AdapterBank

        self._bank = AdapterBank(folder)
        self._numbers = itertools.count(1)
        self._lock = Lock()
        self._first: Adapter | None = None

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Where a user's adapter lies, or None for a name that the bank does not hold.

        Raises AdapterError for a base model with other modules than the bank's, and for what vLLM's format cannot say.
        """
        # beside the server's loop, which answers others meanwhile
        return await asyncio.to_thread(self._resolve, base_model_name, lora_name)

    def _resolve(self, base: str, name: str) -> LoRARequest | None:
        if name not in self._bank:
            return None
        try:
            with self._lock:
                return LoRARequest(name, next(self._numbers), str(self._export(base, name)))
        except AdapterError:
            # another process may have deleted it meanwhile
            if name not in self._bank:
                return None
            raise

    def _export(self, base: str, name: str) -> Path:
        """The folder is named by the numbers in it: a name may be any text."""
        from uniproj.exchange import Adapter, registry

        theta_d = self._bank.get(name)
        if self._first is None:
            self._bank.export(name, self._folder / "first")
            self._first = Adapter.of_file(self._folder / "first", base)
        folder = self._folder / hashlib.sha256(theta_d.numpy().tobytes()).hexdigest()
        registry.get("vllm").write(replace(self._first, theta_d=theta_d), folder, None)
        return folder

    @cached_property
    def _folder(self) -> Path:
        self._kept = TemporaryDirectory(prefix="uniproj-")
        return Path(self._kept.name)
