"""`python -m uniproj verify`, and `inspect`."""

from __future__ import annotations

import json
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


def test_inspect_prints_everything_known_without_a_model(tmp_path: Path, capsys, monkeypatch) -> None:
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
    for part in (
        "unilora",
        "an/organisation",
        "abc",
        header.checksum,
        "layers.2.q (out 24, in 16, r 3)",
        "lora_alpha=6",
    ):
        assert part in said


def test_a_bad_file_gives_its_sentence_and_status_2(tmp_path: Path, capsys) -> None:
    save(tmp_path)
    reconfigure(tmp_path, lora_alpha=99)
    for command in ("inspect", "verify"):
        assert main([command, str(tmp_path)]) == 2
        assert "lora_alpha must be 3 as in the header" in capsys.readouterr().err


def test_verify_rebuilds_P_and_looks_at_the_base(place: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("weights were loaded"))
    assert main(["verify", str(place / "unilora"), "--base", str(place / "base")]) == 0
    said = capsys.readouterr().out
    assert "has its checksum" in said and "has its 14 modules" in said
    assert main(["verify", str(place / "lora_xs"), "--base", str(place / "base")]) == 0
    assert "is checked on loading" in capsys.readouterr().out


def test_verify_names_what_does_not_fit(place: Path, tmp_path: Path, capsys) -> None:
    fields = json.loads((place / "base" / "config.json").read_text())
    for change, message in (
        ({"num_hidden_layers": 1}, "model.layers.1.mlp.down_proj is missing in this model"),
        ({"num_hidden_layers": 3}, "this model has model.layers.2.mlp.down_proj besides, and 6 more"),
        ({"intermediate_size": 40}, "must have (out, in) = (32, 48), got (32, 40)"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**fields, **change}))
        assert main(["verify", str(place / "unilora"), "--base", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
    assert main(["verify", str(place / "unilora"), "--base", str(tmp_path / "nowhere")]) == 2
    assert "must be a model" in capsys.readouterr().err


def _llama_folder(folder: Path, **changes) -> Path:
    (folder / "config.json").write_text(
        json.dumps({**base().config.to_dict(), "architectures": ["LlamaForCausalLM"], **changes})
    )
    return folder


@pytest.mark.parametrize(
    ("fields", "said"),
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
def test_verify_looks_at_the_vocabulary(fields, said: str, tmp_path: Path, capsys) -> None:
    adapter, other = tmp_path / "adapter", tmp_path / "other"
    other.mkdir()
    get_peft_model(base(), UniProjConfig(d=40, r=4, target_modules=["q_proj"], **fields)).save_pretrained(adapter)
    assert main(["verify", str(adapter), "--base", str(_llama_folder(other))]) == 0
    assert "has what is trained beside them, with its shapes: " in capsys.readouterr().out
    assert main(["verify", str(adapter), "--base", str(_llama_folder(other, vocab_size=16))]) == 2
    assert said in capsys.readouterr().err
    if fields == {"modules_to_save": ["embed_tokens"]}:
        assert main(["verify", str(adapter), "--base", str(_llama_folder(other, vocab_size=80))]) == 2


def test_verify_looks_at_the_head(tmp_path: Path, capsys) -> None:
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    config = UniProjConfig(d=40, r=4, target_modules=["query"], task_type="SEQ_CLS")
    model = BertForSequenceClassification(BertConfig(**sizes, num_labels=5))
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    for labels, status in ((5, 0), (2, 2)):
        BertConfig(**sizes, num_labels=labels).save_pretrained(tmp_path / "base")
        assert main(["verify", str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]) == status
        out = capsys.readouterr()
        assert ("classifier.bias, classifier.weight" in out.out) == (status == 0)
    assert "classifier.bias: the adapter was trained with shape (5,), this model has (2,)" in out.err
    assert "num_labels=5" in out.err
    roberta = RobertaConfig(**sizes, num_labels=5, architectures=["RobertaForSequenceClassification"])
    roberta.save_pretrained(tmp_path / "base")
    assert main(["verify", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), "--remap", "bert=roberta"]) == 2
    assert "classifier.bias: the adapter's file holds a trained tensor (5,) for it" in capsys.readouterr().err


def test_verify_takes_a_remap_table(place: Path, tmp_path: Path, capsys) -> None:
    save(tmp_path)
    assert main(["verify", str(tmp_path), "--remap", "layers=blocks"]) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path), "--remap", "nothing=blocks"]) == 2
    assert "run of whole components" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["verify", str(tmp_path), "--remap", "layers"])


def test_verify_finds_another_P(place: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(get("unilora"), "_matvec", lambda self, theta_d, dtype: theta_d.new_ones(len(theta_d), self.D))
    monkeypatch.setattr(get("unilora"), "at_rows", lambda self, theta_d, rows: theta_d.new_ones(len(rows)))
    assert main(["verify", str(place / "unilora")]) == 2
    assert "must have the checksum" in capsys.readouterr().err
