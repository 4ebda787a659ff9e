"""Which adapter is trained after each of PEFT's calls: the same as with plain LoRA, call by call."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

from tests.tuner.models import TARGETS, base_model, config

Calls = Callable[[PeftModel, Callable[[], PeftConfig], Path], None]


def _disable_and_enable(model: PeftModel, new, saved: Path) -> None:
    with model.disable_adapter():
        pass


def _freeze(model: PeftModel) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)


SCRIPTS: dict[str, Calls] = {
    "attach": lambda m, new, saved: None,
    "add": lambda m, new, saved: m.add_adapter("two", new()),
    "load": lambda m, new, saved: m.load_adapter(saved, "two"),
    "load to train": lambda m, new, saved: m.load_adapter(saved, "two", is_trainable=True),
    "add and set": lambda m, new, saved: (m.add_adapter("two", new()), m.set_adapter("two")),
    "add and set both": lambda m, new, saved: (
        m.add_adapter("two", new()),
        m.base_model.set_adapter(["default", "two"]),
    ),
    "add and delete the active": lambda m, new, saved: (m.add_adapter("two", new()), m.delete_adapter("default")),
    "disable and enable": _disable_and_enable,
    "disabled": lambda m, new, saved: m.base_model.disable_adapter_layers(),
    "disabled, then set": lambda m, new, saved: (m.base_model.disable_adapter_layers(), m.set_adapter("default")),
    "inference": lambda m, new, saved: m.set_adapter("default", inference_mode=True),
    "inference, disabled, enabled": lambda m, new, saved: (
        m.set_adapter("default", inference_mode=True),
        _disable_and_enable(m, new, saved),
    ),
    "frozen by hand": lambda m, new, saved: _freeze(m),
    "frozen by hand, then add": lambda m, new, saved: (_freeze(m), m.add_adapter("two", new())),
    "requires_grad of another": lambda m, new, saved: (
        m.add_adapter("two", new()),
        m.set_requires_grad("two", True),
    ),
    "merge and unmerge": lambda m, new, saved: (m.merge_adapter(), m.unmerge_adapter()),
}


def _trainable(model: PeftModel) -> set[str]:
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    return {adapter for adapter in model.peft_config if any(f".{adapter}." in f"{n}." for n in names)}


def _new(kind: str) -> PeftConfig:
    lora = LoraConfig(r=4, target_modules=TARGETS["llama"], task_type="CAUSAL_LM")
    return lora if kind == "lora" else config("llama")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("lora", "uniproj")}
    for kind, folder in folders.items():
        get_peft_model(base_model("llama"), _new(kind)).save_pretrained(folder)
    return folders


@pytest.mark.parametrize("loaded", [False, True], ids=["new", "loaded"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_same_adapters_are_trained_as_with_lora(script: str, loaded: bool, saved: dict[str, Path]) -> None:
    found = []
    for kind, folder in saved.items():
        base = base_model("llama")
        model = PeftModel.from_pretrained(base, folder) if loaded else get_peft_model(base, _new(kind))
        SCRIPTS[script](model, partial(_new, kind), folder)
        found.append((_trainable(model), model.active_adapters))
    assert found[0] == found[1]
