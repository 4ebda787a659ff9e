"""PEFT: the settings of LoraConfig."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model

from analysis.capabilities.probe import check, probe
from analysis.capabilities.subjects import (
    adapted,
    bert,
    config,
    llama,
    logits,
    moved,
    same,
    saved,
    theta_d,
    trained,
)
from uniproj.tuner import adapter_of

SETTINGS = "PEFT: settings"


def _kinds(model: Any) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in adapter_of(model).P.layout.modules}


def _round_trip(folder: Path, **fields: Any) -> Any:
    """Everything that is trained moves, is saved and comes back."""
    model = adapted(llama(attention_bias=True), **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.eval().save_pretrained(folder)
    same(logits(PeftModel.from_pretrained(llama(attention_bias=True), folder)), logits(model), "logits")
    return model


@probe(SETTINGS, "`target_modules`: a regular expression")
def _(folder: Path) -> None:
    model = adapted(target_modules=r".*\.1\..*q_proj")
    check(adapter_of(model).P.layout.modules == ("model.layers.1.self_attn.q_proj",), "wrong modules")


@probe(SETTINGS, '`target_modules="all-linear"`, `exclude_modules`')
def _(folder: Path) -> None:
    check(len(_kinds(adapted(target_modules="all-linear"))) == 7, "not all seven kinds of linear layers")
    kinds = _kinds(adapted(target_modules="all-linear", exclude_modules=["down_proj"]))
    check(len(kinds) == 6 and "down_proj" not in kinds, f"got {kinds}")


@probe(SETTINGS, "`target_modules`: a name that no module bears, beside others")
def _(folder: Path) -> None:
    adapted(target_modules=["q_proj", "query"])


@probe(SETTINGS, "`layers_to_transform`, `layers_pattern`")
def _(folder: Path) -> None:
    model = adapted(layers_to_transform=[1], layers_pattern="layers")
    check(len(adapter_of(model).P.layout.modules) == 3, "not one layer of two")


@probe(SETTINGS, "`modules_to_save`")
def _(folder: Path) -> None:
    model = _round_trip(folder, modules_to_save=["embed_tokens", "lm_head"])
    trained_names = [name for name, p in model.named_parameters() if p.requires_grad]
    check(any("lm_head" in name for name in trained_names), f"trained are {trained_names}")


@probe(SETTINGS, "a classification head (`task_type=SEQ_CLS`) is trained and saved")
def _(folder: Path) -> None:
    model = adapted(bert(), target_modules=["query", "value"], task_type="SEQ_CLS")
    check(any("classifier" in n for n, p in model.named_parameters() if p.requires_grad), "the head is frozen")
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(0.1)
    model.eval().save_pretrained(folder)
    same(logits(PeftModel.from_pretrained(bert(), folder)), logits(model), "logits")


@probe(SETTINGS, "a head of another number of labels than the base's")
def _(folder: Path) -> None:
    adapted(bert(), target_modules=["query", "value"], task_type="SEQ_CLS").save_pretrained(folder)
    base = bert()
    base.classifier = torch.nn.Linear(base.config.hidden_size, 5)
    PeftModel.from_pretrained(base, folder)


@probe(SETTINGS, '`bias="lora_only"`, `bias="all"`')
def _(folder: Path) -> None:
    for bias in ("lora_only", "all"):
        model = _round_trip(folder, bias=bias)
        check(any("bias" in n for n, p in model.named_parameters() if p.requires_grad), "no bias is trained")


@probe(SETTINGS, "`rank_pattern`, `alpha_pattern`, `use_rslora`")
def _(folder: Path) -> None:
    model = adapted(rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 8}, use_rslora=True, lora_alpha=4)
    layout, layers = adapter_of(model).P.layout, model.base_model.model.model.layers
    check(layout.block("model.layers.0.self_attn.v_proj", "A").shape[0] == 2, "the rank is another")
    check(layers[0].self_attn.q_proj.scaling["default"] == 8 / 2, "the scale is not alpha / sqrt(r)")


@probe(SETTINGS, "`rank_pattern` with a method that shares factors")
def _(folder: Path) -> None:
    adapted(projection="vera", d=None, rank_pattern={"v_proj": 2})


@probe(SETTINGS, "`lora_dropout`: in training only")
def _(folder: Path) -> None:
    model = adapted(lora_dropout=0.5)
    with torch.no_grad():
        theta_d(model).mul_(50.0)
    moved(logits(model.train()), logits(model), "logits of two passes in training")
    same(logits(model.eval()), logits(model), "logits of two passes in eval mode")


@probe(SETTINGS, "`trainable_token_indices`, also with tied embeddings")
def _(folder: Path) -> None:
    for tied in (False, True):
        model = adapted(llama(tie_word_embeddings=tied), trainable_token_indices=[1, 2])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "trainable_tokens_delta" in name:
                    parameter.add_(0.3)
        model.eval().save_pretrained(folder / str(tied))
        again = PeftModel.from_pretrained(llama(tie_word_embeddings=tied), folder / str(tied))
        same(logits(again), logits(model), "logits")


@probe(SETTINGS, "`autocast_adapter_dtype=False`: factors in the base's dtype")
def _(folder: Path) -> None:
    model = get_peft_model(llama().bfloat16(), config(), autocast_adapter_dtype=False)
    logits(model)
    A = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    check(A.dtype == torch.bfloat16 and theta_d(model).dtype == torch.float32, f"A is {A.dtype}")


@probe(SETTINGS, "another projection than Uni-LoRA: linear, affine, learned, of base weights")
def _(folder: Path) -> str:
    names = ("fastfood", "nola", "vblora", "lora_xs")
    for name in names:
        path, expected = saved(folder / name, projection=name, d=60 if name in ("fastfood", "nola") else None)
        same(logits(PeftModel.from_pretrained(llama(), path)), expected, f"logits of {name}")
    return ", ".join(names)


for _field, _value in (
    ("use_dora", True),
    ("lora_bias", True),
    ("target_parameters", ["experts.gate_up_proj"]),
    ("layer_replication", [[0, 2], [1, 2]]),
    ("alora_invocation_tokens", [1, 2]),
    ("ensure_weight_tying", True),
    ("use_qalora", True),
    ("init_lora_weights", "pissa"),
    ("init_lora_weights", "olora"),
    ("init_lora_weights", "gaussian"),
):

    @probe(SETTINGS, f"`{_field}={_value!r}`")
    def _(folder: Path, field: str = _field, value: Any = _value) -> None:
        trained(**{field: value})
