"""`python -m uniproj verify`, and `inspect`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig

from tests.format.fixtures import base
from tests.format.saved import reconfigure, save
from uniproj import get
from uniproj.cli import main
from uniproj.format import file
from uniproj.tuner import UniProjConfig

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base model's folder, and adapters that were trained on it."""
    place = tmp_path_factory.mktemp("place")
    base().save_pretrained(place / "base")
    for projection in ("unilora", "lora_xs"):
        config = UniProjConfig(
            projection=projection, d=40 if get(projection).free_d else None, r=4, target_modules=LINEAR
        )
        get_peft_model(base(), config).save_pretrained(place / projection)
    return place


@pytest.fixture
def verify(capsys) -> Callable[..., tuple[int, str]]:
    """Status and output of the command."""

    def run(adapter: Path, base: Path | None = None, *more: str) -> tuple[int, str]:
        status = main(["verify", str(adapter), *(("--base", str(base)) if base else ()), *more])
        return status, "".join(capsys.readouterr())

    return run


def test_inspect_prints_everything_known_without_a_model(tmp_path: Path, capsys) -> None:
    written = save(tmp_path, base_model_name_or_path="an/organisation", revision="abc", lora_alpha=6)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    header = written.header
    assert header is not None
    expected = {
        "format_version": 3,
        "projection": "unilora",
        "projection_version": get("unilora").version,
        "projection_seed": 7,
        "projection_kwargs": {},
        "d": 40,
        "D": 4 * (24 + 16) * 3,
        "checksum": header.checksum,
        "layout_fingerprint": header.layout.fingerprint,
        "base_model": "an/organisation",
        "base_revision": "abc",
        "base_quantisation": None,
        "library_version": header.library_version,
        "bytes_of_tensors": 4 * 40 + 4 * 6,
    }
    assert {key: found[key] for key in expected} == expected
    assert found["settings"]["lora_alpha"] == 6
    assert [row[0] for row in found["modules"]] == ["layers.2.q", "layers.2.v", "layers.10.q", "layers.10.v"]
    assert found["bytes"][file.WEIGHTS] == (tmp_path / file.WEIGHTS).stat().st_size
    assert main(["inspect", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    modules = "layers.2.q (out 24, in 16, r 3)"
    for part in ("unilora", "an/organisation", "abc", header.checksum, modules, "lora_alpha=6"):
        assert part in said


def test_a_bad_file_gives_its_sentence_and_status_2(tmp_path: Path, capsys) -> None:
    save(tmp_path)
    reconfigure(tmp_path, lora_alpha=99)
    for command in ("inspect", "verify"):
        assert main([command, str(tmp_path)]) == 2
        assert "lora_alpha must be 3 as in the header" in capsys.readouterr().err


def test_verify_rebuilds_P_and_looks_at_the_base(place: Path, verify, monkeypatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("weights were loaded"))
    status, said = verify(place / "unilora", place / "base")
    assert status == 0 and "has its checksum" in said and "has its 14 modules" in said
    status, said = verify(place / "lora_xs", place / "base")
    assert status == 0 and "is checked on loading" in said


def test_verify_names_what_does_not_fit(place: Path, tmp_path: Path, verify) -> None:
    for change, message in (
        ({"num_hidden_layers": 1}, "model.layers.1.mlp.down_proj is missing in this model"),
        ({"num_hidden_layers": 3}, "this model has model.layers.2.mlp.down_proj besides, and 6 more"),
        ({"intermediate_size": 40}, "must have (out, in) = (32, 48), got (32, 40)"),
    ):
        status, said = verify(place / "unilora", _llama(tmp_path, **change))
        assert status == 2 and message in said
    status, said = verify(place / "unilora", tmp_path / "nowhere")
    assert status == 2 and "must be a model" in said


def _llama(folder: Path, **changes: int) -> Path:
    """A folder with the configuration of the base model alone, changed."""
    fields = {**base().config.to_dict(), "architectures": ["LlamaForCausalLM"], **changes}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"modules_to_save": ["embed_tokens"]},
            "model.embed_tokens.weight: the adapter was trained with shape (24, 32)",
        ),
        ({"modules_to_save": ["lm_head"]}, "(16, 32). Call resize_token_embeddings(24) on the base model first"),
        (
            {"trainable_token_indices": [1, 20]},
            "trainable_token_indices must be below 16, the tokens of this model, got 20",
        ),
        ({"trainable_token_indices": {"embed_tokens": [20]}}, "trainable_token_indices must be below 16"),
    ],
)
def test_verify_looks_at_the_vocabulary(fields, message: str, tmp_path: Path, verify) -> None:
    adapter = tmp_path / "adapter"
    get_peft_model(base(), UniProjConfig(d=40, r=4, target_modules=["q_proj"], **fields)).save_pretrained(adapter)
    status, said = verify(adapter, _llama(tmp_path))
    assert status == 0 and "has what is trained beside them, with its shapes: " in said
    status, said = verify(adapter, _llama(tmp_path, vocab_size=16))
    assert status == 2 and message in said
    if fields == {"modules_to_save": ["embed_tokens"]}:
        assert verify(adapter, _llama(tmp_path, vocab_size=80))[0] == 2


def test_verify_looks_at_the_head(tmp_path: Path, verify) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 8}
    adapter, other = tmp_path / "adapter", tmp_path / "base"
    config = UniProjConfig(d=40, r=4, target_modules=["query"], task_type="SEQ_CLS")
    get_peft_model(BertForSequenceClassification(BertConfig(**sizes, num_labels=5)), config).save_pretrained(adapter)
    BertConfig(**sizes, num_labels=5).save_pretrained(other)
    status, said = verify(adapter, other)
    assert status == 0 and "classifier.bias, classifier.weight" in said
    BertConfig(**sizes, num_labels=2).save_pretrained(other)
    status, said = verify(adapter, other)
    assert status == 2 and "classifier.bias: the adapter was trained with shape (5,), this model has (2,)" in said
    assert "num_labels=5" in said
    RobertaConfig(**sizes, num_labels=5, architectures=["RobertaForSequenceClassification"]).save_pretrained(other)
    status, said = verify(adapter, other, "--remap", "bert=roberta")
    assert status == 2 and "classifier.bias: the adapter's file holds a trained tensor (5,) for it" in said


def test_verify_takes_a_remap_table(tmp_path: Path, verify) -> None:
    save(tmp_path)
    assert verify(tmp_path, None, "--remap", "layers=blocks")[0] == 0
    status, said = verify(tmp_path, None, "--remap", "nothing=blocks")
    assert status == 2 and "run of whole components" in said
    with pytest.raises(SystemExit):
        verify(tmp_path, None, "--remap", "layers")


def test_verify_finds_another_P(place: Path, verify, monkeypatch) -> None:
    monkeypatch.setattr(get("unilora"), "_matvec", lambda self, theta_d, dtype: theta_d.new_ones(len(theta_d), self.D))
    monkeypatch.setattr(get("unilora"), "at_rows", lambda self, theta_d, rows: theta_d.new_ones(len(rows)))
    status, said = verify(place / "unilora")
    assert status == 2 and "must have the checksum" in said
