"""No command on adapters runs code that a base model's folder brings along, unless it is told to."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from peft import LoraConfig, VeraConfig, get_peft_model
from torch import nn

from tests.format.fixtures import base
from uniproj import AdapterError
from uniproj.cli import main
from uniproj.exchange import bases, export, import_adapter
from uniproj.exchange.adapter import Adapter
from uniproj.exchange.verify import verify
from uniproj.format.places import adapted_modules
from uniproj.tuner import UniProjConfig

CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM

class Config(LlamaConfig):
    model_type = "foreign"

class Model(LlamaForCausalLM):
    config_class = Config
"""
MAP = {"AutoConfig": "foreign.Config", **dict.fromkeys(("AutoModel", "AutoModelForCausalLM"), "foreign.Model")}


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    """Adapters, and the folder of a base model whose code writes a file when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    base().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "foreign.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    fields = json.loads((tmp_path / "base" / "config.json").read_text())
    _write(tmp_path, {**fields, "model_type": "foreign", "auto_map": MAP})
    targets = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    ours = UniProjConfig(projection="lora_xs", r=4, **targets)
    for name, config in (("ours", ours), ("lora", LoraConfig(r=4, **targets)), ("vera", VeraConfig(r=4, **targets))):
        get_peft_model(base(), config).save_pretrained(tmp_path / name)
    return tmp_path


def _write(place: Path, fields: dict) -> None:
    (place / "base" / "config.json").write_text(json.dumps(fields))


def _commands(place: Path) -> list[list[str]]:
    commands = (
        "verify {0}/ours",
        "export {0}/ours {0}/out-lora",
        "import {0}/vera {0}/out-vera",
        "import {0}/lora {0}/out-xs --projection lora_xs",
    )
    return [f"{command} --base {{0}}/base".format(place).split() for command in commands]


def test_code_of_a_base_model_runs_on_request_alone(place: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 99))
    for command in _commands(place):
        assert main(command) == 2 and not (place / "marker").exists(), command
        assert "pass trust_remote_code=True (on the command line --trust-remote-code)" in capsys.readouterr().err
    assert not list(place.glob("out*"))
    for command in _commands(place)[:2]:
        assert main([*command, "--trust-remote-code"]) == 0 and (place / "marker").exists()


def test_so_does_each_function(place: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 99))
    foreign = str(place / "base")
    for call in (
        lambda: verify(place / "ours", foreign),
        lambda: Adapter.of_file(place / "ours", foreign),
        lambda: export(place / "ours", place / "out", base=foreign),
        lambda: import_adapter(place / "vera", place / "out", base=foreign),
        lambda: import_adapter(place / "lora", place / "out", "lora_xs", base=foreign),
    ):
        with pytest.raises(AdapterError, match="--trust-remote-code"):
            call()
    assert not (place / "marker").exists() and not (place / "out").exists()


def test_a_configuration_names_model_classes_alone(place: Path) -> None:
    fields = base().config.to_dict()
    config = LoraConfig(target_modules=["q_proj"])
    for named in ("pipeline", "Trainer", "LlamaConfig", "AutoTokenizer", "__version__", 5, [7], [[]]):
        _write(place, {**fields, "architectures": [named] if isinstance(named, str) else named})
        with pytest.raises(AdapterError, match=r"architectures must begin with a model class such as Llama.*, got"):
            bases.load(str(place / "base"), config, weights=False)
    for known in (["LlamaForCausalLM"], ["OfAnotherLibrary"], None):
        _write(place, {**fields, "architectures": known})
        assert isinstance(bases.load(str(place / "base"), config, weights=False), nn.Module)


def test_a_kernel_that_a_configuration_names_is_not_fetched(place: Path) -> None:
    _write(place, {**base().config.to_dict(), "attn_implementation": "somebody/attention"})
    for task in (None, "CAUSAL_LM"):
        config = LoraConfig(target_modules=["q_proj"], task_type=task)
        for weights in (False, True):
            found = bases.load(str(place / "base"), config, weights)
            assert len(adapted_modules(found, config)) == 2
