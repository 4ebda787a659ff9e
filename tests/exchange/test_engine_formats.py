"""What holds for the format of every engine: it refuses all but A and B of linear layers, and breaks nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model

from tests.exchange.tools import trained_model
from tests.tuner.models import base_model, config
from uniproj import AdapterError
from uniproj.exchange import export, registry
from uniproj.exchange.formats._peft import PeftMethod

FORMATS = [name for name in registry.names() if not isinstance(registry.get(name), PeftMethod)]
each_format = pytest.mark.parametrize("to", FORMATS)


def _out(folder: Path, to: str) -> Path:
    return folder / f"out{registry.get(to).suffix}"


@each_format
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"modules_to_save": ["lm_head"]}, r"must hold A and B alone, got modules_to_save=\['lm_head'\]"),
        ({"bias": "all"}, "must hold A and B alone, got bias='all'"),
        ({"trainable_token_indices": [3, 5]}, "must hold A and B alone, got trainable_token_indices"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "holds linear layers alone, got model.embed_tokens"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "has no layer_replication"),
        ({"alora_invocation_tokens": [7, 8]}, "has no alora_invocation_tokens"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_no_engine_takes_is_refused(to: str, fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = get_peft_model(base_model("llama"), config("llama", **fields))
    with pytest.raises(AdapterError, match=said):
        export(model, _out(tmp_path, to), to=to)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", [to for to in FORMATS if not registry.get(to).takes_rank])
def test_a_rank_is_refused(to: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"rank must be left out for {to}, which has the adapter's, got 8"):
        export(trained_model("llama", "unilora"), _out(tmp_path, to), to=to, rank=8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("to", "suffix"), [("gguf", ".gguf"), ("gguf_f16", ".gguf"), ("onnx", ".onnx_adapter")])
def test_another_ending_is_refused(to: str, suffix: str, tmp_path: Path) -> None:
    for name in ("out", "out.x", f"out{suffix}.x"):
        with pytest.raises(AdapterError, match=rf"name that ends in \{suffix}, got .*{name}\. Rename it"):
            export(trained_model("llama", "unilora"), tmp_path / name, to=to)
    assert not list(tmp_path.iterdir())


@each_format
def test_an_export_that_breaks_off_leaves_what_was_there(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if to == "onnx":
        pytest.importorskip("onnxruntime")

    def found() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    export(trained_model("llama", "unilora"), _out(tmp_path, to), to=to)
    before = found()

    def breaks(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    other = trained_model("llama", "unilora", lora_alpha=6)
    with monkeypatch.context() as full:
        full.setattr("os.fsync", breaks)
        with pytest.raises(AdapterError, match="No space left on device"):
            export(other, _out(tmp_path, to), to=to)
    assert found() == before
    export(other, _out(tmp_path, to), to=to)
    assert found().keys() == before.keys() and found() != before
