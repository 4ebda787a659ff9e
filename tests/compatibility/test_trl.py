"""TRL: trainers that take a PEFT configuration or an adapted model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForSequenceClassification
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from tests.compatibility.quantised import quantised
from tests.compatibility.subjects import (
    Refuses,
    Remark,
    adapted,
    config,
    llama,
    logits,
    same,
    theta_d,
    trained_model,
)
from tests.compatibility.texts import labelled, plain, preferences, prompts, tokenizer
from tests.tuner.models import make

capability = partial(pytest.mark.capability, "TRL")


def _trains(trainer_class: Any, config_class: Any, model: Any, data: Any, folder: Path, **options: Any) -> Any:
    """Two steps of a trainer: theta_d must move and nothing else of the base."""
    reward = {"reward_funcs": options.pop("reward_funcs")} if "reward_funcs" in options else {}
    given = {key: options.pop(key) for key in ("peft_config", "ref_model") if key in options}
    arguments = config_class(
        str(folder), max_steps=2, per_device_train_batch_size=4, learning_rate=0.02, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_steps=1, bf16=False, gradient_checkpointing=False, **options,
    )  # fmt: skip
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer(), **given, **reward
    )
    before = theta_d(trainer.model).detach().clone()
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert not torch.equal(theta_d(trainer.model), before)
    for name, parameter in trainer.model.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name])
    return trainer


@capability("`SFTTrainer(peft_config=...)`")
def test_sfttrainer_peft_config(tmp_path: Path) -> None:
    _trains(SFTTrainer, SFTConfig, llama(), plain(), tmp_path, peft_config=config(), max_length=8)


@capability("`SFTTrainer` with an adapted model, packing")
def test_sfttrainer_with_an_adapted_model_packing(tmp_path: Path) -> None:
    _trains(SFTTrainer, SFTConfig, adapted(), plain(), tmp_path, max_length=8, packing=True, packing_strategy="wrapped")


@capability("`SFTTrainer(peft_config=...)` on a 4-bit base")
def test_sfttrainer_peft_config_on_a_4_bit_base(tmp_path: Path, remark: Remark) -> None:
    base = quantised(tmp_path, "bitsandbytes, 4 bits (NF4)")
    trainer = _trains(SFTTrainer, SFTConfig, base, plain(), tmp_path / "run", peft_config=config(), max_length=8)
    remark(f"TRL rounds theta_d of quantised bases to {str(theta_d(trainer.model).dtype)[6:]}")


@capability("`DPOTrainer(peft_config=...)`: the bare base is the reference")
def test_dpotrainer_peft_config_the_bare_base_is_the_reference(tmp_path: Path) -> None:
    trainer = _trains(DPOTrainer, DPOConfig, llama(), preferences(), tmp_path, peft_config=config())
    assert trainer.ref_model is None
    with trainer.model.disable_adapter():
        same(logits(trainer.model), logits(llama()), "logits of the reference")


@capability("`DPOTrainer` with a fresh adapter: its start is the reference")
def test_dpotrainer_with_a_fresh_adapter_its_start_is_the_reference(tmp_path: Path) -> None:
    trainer = _trains(DPOTrainer, DPOConfig, adapted(), preferences(), tmp_path)
    same(theta_d(trainer.model, "ref"), theta_d(adapted()), "theta_d of the reference")


@capability("`DPOTrainer` with a trained adapter as its own reference")
def test_dpotrainer_with_a_trained_adapter_as_its_own_reference(tmp_path: Path, refuses: Refuses) -> None:
    with refuses():
        _trains(DPOTrainer, DPOConfig, trained_model(), preferences(), tmp_path)


@capability("`DPOTrainer` with a trained adapter, and a merged copy as `ref_model`")
def test_dpotrainer_with_a_trained_adapter_and_a_merged_copy_as_ref_model(tmp_path: Path) -> None:
    reference = trained_model().merge_and_unload()
    _trains(DPOTrainer, DPOConfig, trained_model(), preferences(), tmp_path, ref_model=reference)


@capability("`KTOTrainer(peft_config=...)`")
def test_ktotrainer_peft_config(tmp_path: Path) -> None:
    _trains(KTOTrainer, KTOConfig, llama(), labelled(), tmp_path, peft_config=config())


@capability("`RewardTrainer(peft_config=...)`")
def test_rewardtrainer_peft_config(tmp_path: Path) -> None:
    model_config = llama().config
    model_config.num_labels, model_config.pad_token_id = 1, 0
    base = make(LlamaForSequenceClassification, model_config)
    fields = config(task_type="SEQ_CLS", modules_to_save=["score"])
    _trains(RewardTrainer, RewardConfig, base, preferences(), tmp_path, peft_config=fields, max_length=12)


def _reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


@pytest.mark.parametrize(
    ("trainer_class", "config_class"),
    [
        pytest.param(GRPOTrainer, GRPOConfig, marks=capability("`GRPOTrainer(peft_config=...)`")),
        pytest.param(RLOOTrainer, RLOOConfig, marks=capability("`RLOOTrainer(peft_config=...)`")),
    ],
)
def test_trainers_that_generate(trainer_class: type, config_class: type, tmp_path: Path) -> None:
    options = {"num_generations": 4, "max_completion_length": 6, "reward_funcs": _reward, "beta": 0.1}
    _trains(trainer_class, config_class, llama(), prompts(), tmp_path, peft_config=config(), **options)
