"""What a vLLM server gets of a bank, beside stand-ins of what `uniproj.vllm` imports of vLLM.

tests/engines asks a real server.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel

from tests.bank.models import D, adapted, vector
from tests.tuner.models import base_model, batch
from uniproj import AdapterError
from uniproj.bank import AdapterBank


class _Request(NamedTuple):
    lora_name: str
    lora_int_id: int
    lora_path: str


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, with an empty registry."""
    found: dict[str, Any] = {}
    registry = SimpleNamespace(register_resolver=found.__setitem__, found=found)
    resolver = SimpleNamespace(LoRAResolver=object, LoRAResolverRegistry=registry)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=_Request))
    monkeypatch.setitem(sys.modules, "vllm.lora.resolver", resolver)
    yield importlib.import_module("uniproj.vllm")
    del sys.modules["uniproj.vllm"]


@pytest.fixture
def bank(tmp_path: Path) -> AdapterBank:
    found = AdapterBank.create(tmp_path / "bank", adapted())
    found.add_many({"ada": vector(1), "../bob": vector(2)})
    return found


@pytest.fixture
def base(tmp_path: Path) -> str:
    base_model("llama").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def _path(resolver: Any, base: str, name: str) -> Path:
    return Path(asyncio.run(resolver.resolve_lora(base, name)).lora_path)


def test_it_is_silent_unless_a_bank_is_named(
    vllm: ModuleType, bank: AdapterBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = vllm.LoRAResolverRegistry.found
    monkeypatch.delenv("UNIPROJ_BANK", raising=False)
    vllm.register()
    assert not found
    monkeypatch.setenv("UNIPROJ_BANK", str(bank.folder))
    vllm.register()
    assert [type(each) for each in found.values()] == [vllm.BankResolver]
    monkeypatch.setenv("UNIPROJ_BANK", str(tmp_path / "none"))
    with pytest.raises(AdapterError, match="none"):
        vllm.register()


def test_a_server_without_a_bank_does_not_wait_for_peft() -> None:
    code = """
import sys
from types import SimpleNamespace
sys.modules["vllm.lora.request"] = SimpleNamespace(LoRARequest=None)
sys.modules["vllm.lora.resolver"] = SimpleNamespace(LoRAResolver=object, LoRAResolverRegistry=None)
from uniproj.vllm import register
register()
assert not {"peft", "transformers"} & set(sys.modules)
"""
    without = {name: text for name, text in os.environ.items() if name != "UNIPROJ_BANK"}
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], env=without, check=True)


def test_each_user_gets_the_logits_of_the_bank(vllm: ModuleType, bank: AdapterBank, base: str) -> None:
    resolver, model = vllm.BankResolver(bank.folder), adapted()
    inputs = {key: value for key, value in batch("llama").items() if key != "labels"}
    numbers = set()
    for name in bank:
        request = asyncio.run(resolver.resolve_lora(base, name))
        numbers.add(request.lora_int_id)
        assert request.lora_name == name and request.lora_int_id > 0
        bank.select(model, name)
        with torch.no_grad():
            theirs = PeftModel.from_pretrained(base_model("llama"), request.lora_path)(**inputs).logits
            torch.testing.assert_close(theirs, model(**inputs).logits, rtol=1e-5, atol=1e-5)
    assert len(numbers) == 2
    assert asyncio.run(resolver.resolve_lora(base, "nobody")) is None


def test_many_ask_at_once(vllm: ModuleType, bank: AdapterBank, base: str) -> None:
    resolver = vllm.BankResolver(bank.folder)

    async def ask() -> list[_Request]:
        return await asyncio.gather(*(resolver.resolve_lora(base, name) for name in [*bank] * 4))

    found = asyncio.run(ask())
    assert len({request.lora_int_id for request in found}) == len(found) == 8
    folders = {(request.lora_name, Path(request.lora_path)) for request in found}
    assert len(folders) == 2 and all((folder / "adapter_config.json").is_file() for _, folder in folders)


def test_other_numbers_have_another_path(vllm: ModuleType, bank: AdapterBank, base: str) -> None:
    resolver = vllm.BankResolver(bank.folder)
    first, odd = _path(resolver, base, "ada"), _path(resolver, base, "../bob")
    assert first != odd and first.parent == odd.parent  # whatever the name
    assert _path(resolver, base, "ada") == first
    bank.replace("ada", vector(3))
    assert _path(resolver, base, "ada") not in (first, odd)
    bank.delete("ada")
    assert asyncio.run(resolver.resolve_lora(base, "ada")) is None


def test_a_user_who_is_deleted_meanwhile_is_unknown(
    vllm: ModuleType, bank: AdapterBank, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = AdapterBank.get

    def deleted_before_it_is_read(self: AdapterBank, name: str) -> torch.Tensor:
        bank.delete(name)
        return read(self, name)

    monkeypatch.setattr(AdapterBank, "get", deleted_before_it_is_read)
    assert asyncio.run(vllm.BankResolver(bank.folder).resolve_lora(base, "ada")) is None


def test_an_export_that_breaks_off_is_made_again(
    vllm: ModuleType, bank: AdapterBank, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    resolver = vllm.BankResolver(bank.folder)
    other = _path(resolver, base, "../bob")
    with monkeypatch.context() as here:
        here.setattr("os.fsync", breaks)
        with pytest.raises(AdapterError, match="No space left on device"):
            asyncio.run(resolver.resolve_lora(base, "ada"))
    assert [path for path in other.parent.rglob("*.safetensors") if path.parent.name != "first"] == [
        other / "adapter_model.safetensors"
    ]
    assert (_path(resolver, base, "ada") / "adapter_model.safetensors").stat().st_size > 0


def test_what_is_written_goes_with_the_server(vllm: ModuleType, bank: AdapterBank, base: str) -> None:
    resolver = vllm.BankResolver(bank.folder)
    folder = _path(resolver, base, "ada").parent
    assert folder.is_dir()
    with pytest.warns(ResourceWarning):
        del resolver
    assert not folder.exists()


def test_another_base_and_the_base_itself_are_refused(
    vllm: ModuleType, bank: AdapterBank, base: str, tmp_path: Path
) -> None:
    base_model("llama", num_hidden_layers=3).save_pretrained(tmp_path / "deeper")
    with pytest.raises(AdapterError, match="layer"):
        asyncio.run(vllm.BankResolver(bank.folder).resolve_lora(str(tmp_path / "deeper"), "ada"))
    bank.add("zero", torch.zeros(D))
    with pytest.raises(AdapterError, match="zero"):
        asyncio.run(vllm.BankResolver(bank.folder).resolve_lora(base, "zero"))
