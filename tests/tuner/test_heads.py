"""Heads, embeddings and tokens that the base has no place for, and loads that fail: the base stays as it was."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, peft_model, set_peft_model_state_dict
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from tests.format.saved import rewrite
from tests.tuner.models import batch, train_steps
from uniproj import AdapterError
from uniproj.tuner import UniProjConfig, adapter_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}


def _bert(num_labels: int = 3, vocab_size: int = 64, cls: type = BertForSequenceClassification) -> PreTrainedModel:
    torch.manual_seed(0)
    return cls(BertConfig(**SIZES, vocab_size=vocab_size, num_labels=num_labels)).eval()


def _llama(vocab_size: int = 64, tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=vocab_size, tie_word_embeddings=tied)).eval()


def _config(base: nn.Module, **fields: Any) -> UniProjConfig:
    bert = "Bert" in type(base).__name__
    places = {"target_modules": ["query"], "task_type": "SEQ_CLS"} if bert else {"target_modules": ["q_proj"]}
    return UniProjConfig(**{"d": 40, "r": 2, **places, **fields})


def _saved(folder: Path, base: nn.Module, **fields: Any) -> Path:
    model = get_peft_model(base, _config(base, **fields))
    train_steps(model, "bert" if "Bert" in type(base).__name__ else "llama", 1)
    model.save_pretrained(folder)
    return folder


def _everything(model: nn.Module) -> list[Any]:
    """What a model consists of: its objects, attributes, hooks, flags, and the bits of its numbers."""
    kept = []
    for name, module in model.named_modules():
        plain = {k: list(v) if isinstance(v, (dict, list, set)) else id(v) for k, v in vars(module).items()}
        kept.append((name, id(module), module.training, plain))
    kept += [
        (name, id(p), p.requires_grad, p.detach().clone().numpy().tobytes()) for name, p in model.named_parameters()
    ]
    return kept


CASES: dict[str, tuple[Callable, dict[str, Any], Callable, str]] = {
    "labels": (_bert, {}, lambda: _bert(5), r"^classifier\.bias: .* shape \(3,\), .* \(5,\)\. .* num_labels=3"),
    "no head": (_bert, {}, lambda: _bert(cls=BertForMaskedLM), r"^classifier\.bias: .* this BertForMaskedLM has none"),
    "whole embedding": (
        *(_bert, {"modules_to_save": ["word_embeddings"]}, lambda: _bert(vocab_size=70)),
        r"word_embeddings\.weight: .* \(64, 32\), .* \(70, 32\)\. Call resize_token_embeddings\(64\)",
    ),
    "tied output": (
        *(lambda: _llama(tied=True), {"modules_to_save": ["lm_head"]}, lambda: _llama(50, tied=True)),
        r"^lm_head\.weight: .* \(64, 32\), .* \(50, 32\)\. Call resize_token_embeddings\(64\)",
    ),
    "adapted output": (_llama, {"target_modules": ["lm_head"]}, lambda: _llama(50), r"lm_head must have \(out, in\)"),
    "tokens": (
        *(_llama, {"trainable_token_indices": [1, 60]}, lambda: _llama(50)),
        r"^model\.embed_tokens\.weight: trainable_token_indices must be below 50, .* got 60\. Call resize_token",
    ),
    "tokens by name": (
        *(_llama, {"trainable_token_indices": {"embed_tokens": [60]}}, lambda: _llama(50)),
        r"^model\.embed_tokens\.weight: trainable_token_indices must be below 50",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_has_no_place_is_named_and_the_base_is_left_alone(case: str, tmp_path: Path) -> None:
    trained_on, fields, other, said = CASES[case]
    folder, base = _saved(tmp_path, trained_on(), **fields), other()
    before = _everything(base)
    for _ in range(2):
        with pytest.raises(AdapterError, match=said):
            PeftModel.from_pretrained(base, folder)
        assert _everything(base) == before
    PeftModel.from_pretrained(trained_on(), folder)


def test_tokens_of_a_model_that_does_not_name_its_embedding() -> None:
    def base() -> nn.Module:
        return nn.Sequential(OrderedDict(embed_tokens=nn.Embedding(8, 4), q_proj=nn.Linear(4, 4)))

    model = get_peft_model(base(), _config(base(), d=10, trainable_token_indices=[1, 7]))
    model.add_adapter("other", _config(base(), d=10, trainable_token_indices=[2]))
    with pytest.raises(AdapterError, match=r"^embed_tokens\.weight: trainable_token_indices must be below 8, .* got 8"):
        model.add_adapter("beyond", _config(base(), d=10, trainable_token_indices=[8]))
    assert list(model.peft_config) == ["default", "other"]


def test_the_corrected_second_try_works_on_the_same_base(tmp_path: Path) -> None:
    folder, base = _saved(tmp_path, _bert(5)), _bert(2)
    with pytest.raises(AdapterError, match=r"num_labels=5"):
        PeftModel.from_pretrained(base, folder)
    base.classifier, base.num_labels = nn.Linear(32, 5), 5
    inputs = {k: v for k, v in batch("bert").items() if k != "labels"}
    with torch.no_grad():
        found, wanted = (PeftModel.from_pretrained(m, folder).eval()(**inputs).logits for m in (base, _bert(5)))
    assert torch.equal(found, wanted)


def test_a_head_of_other_tensors_is_refused(tmp_path: Path) -> None:
    folder = _saved(tmp_path, _bert())
    without_bias, deeper = _bert(), _bert()
    without_bias.classifier = nn.Linear(32, 3, bias=False)
    deeper.classifier = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 3))
    for base, said in (
        (without_bias, r"^classifier\.bias: .* has none"),
        (deeper, r"^classifier\.0\.weight: .* got none"),
    ):
        before = _everything(base)
        with pytest.raises(AdapterError, match=said):
            PeftModel.from_pretrained(base, folder)
        assert _everything(base) == before
    rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if not k.endswith("classifier.bias")})
    with pytest.raises(AdapterError, match=r"^classifier\.bias: the adapter's file must hold"):
        PeftModel.from_pretrained(_bert(), folder)


@pytest.mark.parametrize("way", ["beside", "over", "tensors alone"])
def test_an_adapter_that_is_there_stays_whole(way: str, tmp_path: Path) -> None:
    folder = _saved(tmp_path, _bert(5))
    model = get_peft_model(_bert(2), _config(_bert()))
    train_steps(model, "bert", 0)
    before = _everything(model)
    with pytest.raises(AdapterError, match=r"^classifier\.bias: .* shape \(5,\), this model has \(2,\)"):
        if way == "tensors alone":  # by PEFT's public function
            set_peft_model_state_dict(model, peft_model.load_peft_weights(folder))
        else:
            model.load_adapter(folder, "second" if way == "beside" else "default")
    assert _everything(model) == before and list(model.peft_config) == ["default"]


def test_other_sizes_are_passed_over_on_request(tmp_path: Path) -> None:
    """As PEFT does for LoRA: the head stays that of the base, theta_d is loaded."""
    folder, base = _saved(tmp_path, _bert(5)), _bert(2)
    head = base.classifier.weight.clone()
    model = PeftModel.from_pretrained(base, folder, ignore_mismatched_sizes=True)
    assert torch.equal(model.base_model.model.classifier.weight, head)
    right = PeftModel.from_pretrained(_bert(5), folder)
    assert torch.equal(*(adapter_of(m).theta_d for m in (model, right)))
    model.load_adapter(folder, "second", ignore_mismatched_sizes=True)
    with pytest.raises(AdapterError, match="num_labels=5"):
        model.load_adapter(folder, "second")


@pytest.mark.parametrize(
    ("error", "where"), [(OSError, "load_peft_weights"), (KeyboardInterrupt, "set_peft_model_state_dict")]
)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_whatever_fails_midway_leaves_the_base(
    error: type[BaseException], where: str, low_cpu_mem_usage: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, base = _saved(tmp_path, _bert()), _bert()
    base.gradient_checkpointing_enable()
    before = _everything(base.train())

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(peft_model, where, fail)
        with pytest.raises(error):
            PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low_cpu_mem_usage)
        assert _everything(base) == before
    model = PeftModel.from_pretrained(base, folder)
    before = _everything(model)
    with monkeypatch.context() as patched:
        patched.setattr(peft_model, where, fail)
        with pytest.raises(error):
            model.load_adapter(folder, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    assert _everything(model) == before and list(model.peft_config) == ["default"]


def test_an_attachment_that_fails_late_leaves_heads_and_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe comes last: heads are wrapped and copied by then."""
    base = _llama(tied=True)
    before = _everything(base)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("uniproj.tuner.model.check_alive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get_peft_model(base, _config(base, modules_to_save=["embed_tokens"], trainable_token_indices={"lm_head": [1]}))
    assert _everything(base) == before and base.lm_head.weight is base.model.embed_tokens.weight


def test_biases_and_copies_of_heads_in_a_file_have_their_places(tmp_path: Path) -> None:
    for number, bias in enumerate(("all", "lora_only")):
        folder = _saved(tmp_path / str(number), _bert(), bias=bias, modules_to_save=["pooler"])
        model = PeftModel.from_pretrained(_bert(), folder, adapter_name="other")
        assert model.base_model.model.bert.encoder.layer[0].attention.self.query.base_layer.bias.abs().sum() > 0
