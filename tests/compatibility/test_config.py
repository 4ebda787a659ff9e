"""PEFT: the fields of LoraConfig."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.compatibility.subjects import (
    IDS,
    TARGETS,
    Refuses,
    Remark,
    adapted,
    bert,
    config,
    llama,
    logits,
    moved,
    projection,
    same,
    saved,
    theta_d,
)

capability = partial(pytest.mark.capability, "PEFT: configuration")


def _kinds(model: Any) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in projection(model).layout.modules}


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


@capability("`target_modules`: a regular expression")
def test_target_modules_a_regular_expression() -> None:
    model = adapted(target_modules=r".*\.1\..*q_proj")
    assert projection(model).layout.modules == ("model.layers.1.self_attn.q_proj",)


@capability('`target_modules="all-linear"`, `exclude_modules`')
def test_target_modules_all_linear_exclude_modules() -> None:
    assert len(_kinds(adapted(target_modules="all-linear"))) == 7
    kinds = _kinds(adapted(target_modules="all-linear", exclude_modules=["down_proj"]))
    assert len(kinds) == 6 and "down_proj" not in kinds


@capability("`target_modules`: a name that no module bears, beside others")
def test_target_modules_a_name_that_no_module_bears_beside_others(refuses: Refuses) -> None:
    with refuses():
        adapted(target_modules=["q_proj", "query"])


@capability("`layers_to_transform`, `layers_pattern`")
def test_layers_to_transform_layers_pattern() -> None:
    model = adapted(layers_to_transform=[1], layers_pattern="layers")
    assert len(projection(model).layout.modules) == 3


@capability("`modules_to_save`")
def test_modules_to_save(tmp_path: Path) -> None:
    model = _round_trip(tmp_path, modules_to_save=["embed_tokens", "lm_head"])
    trained_names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("lm_head" in name for name in trained_names)


@capability("a classification head (`task_type=SEQ_CLS`) is trained and saved")
def test_a_classification_head_task_type_seq_cls_is_trained_and_saved(tmp_path: Path) -> None:
    model = adapted(bert(), target_modules=["query", "value"], task_type="SEQ_CLS", modules_to_save=["pooler"])
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(any(head in name for name in parameters) for head in ("classifier", "pooler"))
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1)
    model.eval().save_pretrained(tmp_path)
    same(logits(PeftModel.from_pretrained(bert(), tmp_path)), logits(model), "logits")


@capability("a head of another number of labels than the base's")
def test_a_head_of_another_number_of_labels_than_the_base_s(tmp_path: Path, refuses: Refuses) -> None:
    adapted(bert(), target_modules=["query", "value"], task_type="SEQ_CLS").save_pretrained(tmp_path)
    base = bert()
    base.classifier = torch.nn.Linear(base.config.hidden_size, 5)
    with refuses():
        PeftModel.from_pretrained(base, tmp_path)


@capability('`bias="lora_only"`, `bias="all"`')
def test_bias_lora_only_bias_all(tmp_path: Path) -> None:
    for bias in ("lora_only", "all"):
        model = _round_trip(tmp_path, bias=bias)
        assert any("bias" in n for n, p in model.named_parameters() if p.requires_grad)


@capability("`rank_pattern`, `alpha_pattern`, `use_rslora`")
def test_rank_pattern_alpha_pattern_use_rslora() -> None:
    patterns: dict[str, Any] = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 8}}
    for use_rslora, divisor in ((False, 4), (True, 2)):  # r, its square root
        model = adapted(use_rslora=use_rslora, lora_alpha=4, **patterns)
        layout, attention = projection(model).layout, model.base_model.model.model.layers[0].self_attn
        ranks = {name.rsplit(".", 1)[-1]: layout.block(name, "A").shape[0] for name in layout.modules}
        assert ranks == {"q_proj": 4, "v_proj": 2, "down_proj": 4}
        assert attention.q_proj.scaling["default"] == 8 / divisor


@capability("`rank_pattern` with a method that shares factors")
def test_rank_pattern_with_a_method_that_shares_factors(refuses: Refuses) -> None:
    with refuses():
        adapted(projection="vera", d=None, rank_pattern={"v_proj": 2})


@capability("`lora_dropout`: in training only")
def test_lora_dropout_in_training_only() -> None:
    model = adapted(lora_dropout=0.5)
    with torch.no_grad():
        theta_d(model).mul_(50.0)
    moved(logits(model.train()), logits(model), "logits of two passes in training")
    same(logits(model.eval()), logits(model), "logits of two passes in eval mode")


@capability("`trainable_token_indices`, also with tied embeddings")
def test_trainable_token_indices_also_with_tied_embeddings(tmp_path: Path) -> None:
    for tied in (False, True):
        model = adapted(llama(tie_word_embeddings=tied), trainable_token_indices=[1, 2])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "trainable_tokens_delta" in name:
                    parameter.add_(0.3)
        model.eval().save_pretrained(tmp_path / str(tied))
        again = PeftModel.from_pretrained(llama(tie_word_embeddings=tied), tmp_path / str(tied))
        same(logits(again), logits(model), "logits")


@capability("`autocast_adapter_dtype=False`: factors in the base's dtype")
def test_autocast_adapter_dtype_false_factors_in_the_base_s_dtype() -> None:
    lora = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    for cast, expected in ((True, torch.float32), (False, torch.bfloat16)):
        ours, theirs = (
            get_peft_model(llama().bfloat16(), given, autocast_adapter_dtype=cast) for given in (config(), lora)
        )
        logits(ours)
        for model in (ours, theirs):
            assert model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.dtype == expected
        assert theta_d(ours).dtype == torch.float32


@capability("another projection than Uni-LoRA: linear, affine, learned, of base weights")
def test_another_projection_than_uni_lora_linear_affine_learned_of_base_weights(tmp_path: Path, remark: Remark) -> None:
    names = ("fastfood", "nola", "vblora", "lora_xs")
    for name in names:
        path, expected = saved(tmp_path / name, projection=name, d=60 if name in ("fastfood", "nola") else None)
        same(logits(PeftModel.from_pretrained(llama(), path)), expected, f"logits of {name}")
    remark(", ".join(names))


@capability("`{field}={value!r}`: saved, loaded")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_replication", [[0, 2], [1, 2]]),
        ("alora_invocation_tokens", IDS[0, 3:5].tolist()),
        ("ensure_weight_tying", True),
    ],
)
def test_where_the_update_acts(field: str, value: Any, tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": field == "ensure_weight_tying"}
    targets = [*TARGETS, "embed_tokens"] if tied["tie_word_embeddings"] else TARGETS
    model = adapted(llama(**tied), target_modules=targets, **{field: value})
    start = logits(model.eval())
    with torch.no_grad():
        theta_d(model).mul_(20.0)
    moved(logits(model), start, "logits")
    model.save_pretrained(tmp_path)
    same(logits(PeftModel.from_pretrained(llama(**tied), tmp_path)), logits(model), "logits")


@capability("`{field}={value!r}`")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("use_qalora", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "gaussian"),
    ],
)
def test_what_changes_A_and_B(field: str, value: Any, refuses: Refuses) -> None:
    with refuses():
        config(**{field: value})
