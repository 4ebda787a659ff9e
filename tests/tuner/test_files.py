"""Loading reads the weights once, saving writes each file once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel, get_peft_model

from tests.tuner.models import base_model, config
from uniproj.format.file import CONFIG, WEIGHTS
from uniproj.tuner import UniProjConfig, adapter_of


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The names of the files that are opened, one entry each time."""
    names: list[str] = []
    original = os.open

    def count(path: Any, *args: Any, **options: Any) -> int:
        names.append(Path(path).name if isinstance(path, str | Path) else str(path))
        return original(path, *args, **options)

    monkeypatch.setattr(os, "open", count)
    return names


@pytest.fixture
def replaced(monkeypatch) -> list[str]:
    """The names of the files that take their place, one entry each time."""
    names: list[str] = []
    original = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (names.append(Path(b).name), original(a, b))[1])
    return names


def test_a_load_reads_the_weights_once(tmp_path: Path, opened: list[str]) -> None:
    get_peft_model(base_model("llama"), config("llama")).save_pretrained(tmp_path)
    opened.clear()
    model = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    assert opened.count(WEIGHTS) == 1
    model.load_adapter(tmp_path, "again")
    assert opened.count(WEIGHTS) == 2
    # a file that is written between two loads is read anew
    get_peft_model(base_model("llama"), config("llama", init_seed=5)).save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "new")
    assert not (adapter_of(model, "new").theta_d == adapter_of(model, "again").theta_d).all()


def test_a_save_writes_each_file_once(tmp_path: Path, replaced: list[str]) -> None:
    given = config("llama")
    given.task_type = None
    get_peft_model(base_model("llama"), given).save_pretrained(tmp_path)
    assert [name for name in replaced if name in (CONFIG, WEIGHTS)] == [WEIGHTS, CONFIG]
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert fields["inference_mode"] is True and fields["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"


def test_a_save_that_ends_between_the_two_files_leaves_both(tmp_path: Path, monkeypatch) -> None:
    model = get_peft_model(base_model("llama"), config("llama"))
    model.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    adapter_of(model).theta_d.data.add_(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(UniProjConfig, "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(tmp_path)
    model.peft_config["default"].save_pretrained(tmp_path)  # numbers that were given up are not written by it
    assert (tmp_path / WEIGHTS).read_bytes() == before[WEIGHTS]
