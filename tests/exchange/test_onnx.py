"""Export to ONNX Runtime: the written file, read by ONNX Runtime, has the updates of the model by the names that the
model builder of ONNX Runtime GenAI gives to the inputs of a model."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from tests.exchange.tools import SAME, difference, saved, trained_model
from tests.tuner.models import base_model, config
from uniproj import AdapterError
from uniproj.exchange import export

ODD = {"rank_pattern": {"layers.0.self_attn.q_proj": 3}, "alpha_pattern": {"v_proj": 7}, "r": 4, "lora_alpha": 6}
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class _Recorder:
    """In place of ONNX Runtime's AdapterFormat, where it is not installed: what it is given."""

    written: dict[str, np.ndarray] = {}

    def set_parameters(self, parameters: dict[str, np.ndarray]) -> None:
        self.parameters = parameters

    def export_adapter(self, path: str) -> None:
        type(self).written = {name: array.copy() for name, array in self.parameters.items()}
        Path(path).write_bytes(b"by ONNX Runtime")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[_Recorder]:
    as_is = SimpleNamespace(ortvalue_from_numpy=lambda array: array)
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(AdapterFormat=_Recorder, OrtValue=as_is))
    return _Recorder


@torch.no_grad()
def _by_the_builders_names(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """delta W (out, in) by module: a layer adds x A B, with A (in, r) and B (r, out), of an input x.

    The builder's nodes are /model/layers.N/attn/q_proj/lora_A/MatMul and so on, and their weights are called as them.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, array in arrays.items():
        assert array.dtype == np.float32
        match = re.fullmatch(r"(model\.layers\.\d+\.(?:attn|mlp)\.\w+)\.lora_([AB])\.MatMul\.weight", name)
        assert match is not None, f"{name} is no input"
        pairs.setdefault(match[1].replace(".attn.", ".self_attn."), {})[match[2]] = torch.tensor(array).double()
    return {module: (pair["A"] @ pair["B"]).T for module, pair in pairs.items()}


def _check(arrays: dict[str, np.ndarray], model: Any) -> None:
    found = _by_the_builders_names(arrays)
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert found.keys() == layers.keys()
    for name, delta in found.items():
        assert difference(delta, layers[name].get_delta_weight("default")) <= SAME, name


@pytest.mark.parametrize("fields", [{"target_modules": EVERY, "lora_alpha": 6}, {"use_rslora": True}, ODD])
def test_the_updates_are_those_of_the_model(fields: dict[str, Any], tmp_path: Path, recorded: type[_Recorder]) -> None:
    model = trained_model("llama", "unilora", **fields)
    out = tmp_path / "theirs" / "ada.onnx_adapter"
    export(saved(model, tmp_path / "ours"), out, to="onnx")
    assert out.read_bytes() == b"by ONNX Runtime" and [*out.parent.iterdir()] == [out]
    _check(recorded.written, model)


def test_onnx_runtime_reads_it(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = trained_model("llama", "unilora", **ODD)
    export(model, tmp_path / "ada.onnx_adapter", to="onnx")
    read = onnxruntime.AdapterFormat.read_adapter(str(tmp_path / "ada.onnx_adapter"))
    _check({name: value.numpy() for name, value in read.get_parameters().items()}, model)


def test_other_modules_are_refused(tmp_path: Path) -> None:
    gpt2 = get_peft_model(base_model("gpt2"), config("gpt2"))
    head = get_peft_model(base_model("llama"), config("llama", target_modules=["q_proj", "lm_head"]))
    for model, name in (gpt2, r"transformer\.h\.0\.attn\.c_attn"), (head, "lm_head"):
        with pytest.raises(AdapterError, match=f"whose names in its models are known, got {name}"):
            export(model, tmp_path / "ada.onnx_adapter", to="onnx")
    assert not [*tmp_path.iterdir()]


def test_without_the_package_or_space_for_its_file_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: type[_Recorder]
) -> None:
    model, out = trained_model("llama", "unilora"), tmp_path / "ada.onnx_adapter"
    out.write_bytes(b"before")

    def fails(*_: Any) -> None:
        raise RuntimeError("Failed to write :3240104 bytes")

    with monkeypatch.context() as without:
        without.setattr("tempfile.tempdir", str(tmp_path / "gone"))
        with pytest.raises(AdapterError, match=r"must have space for one, got .*No such file.*/gone.* set TMPDIR"):
            export(model, out, to="onnx")
    monkeypatch.setattr(recorded, "export_adapter", fails)
    with pytest.raises(AdapterError, match=r"must have space for one, got Failed to write .* Free some"):
        export(model, out, to="onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(AdapterError, match=r"needs the package onnxruntime, .* Run pip install 'uniproj.onnx.'"):
        export(model, out, to="onnx")
    assert out.read_bytes() == b"before" and [*tmp_path.iterdir()] == [out]
