"""TRL: trainers that take a PEFT configuration or an adapted model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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

from analysis.capabilities.probe import check, probe
from analysis.capabilities.quantised import quantised
from analysis.capabilities.subjects import adapted, config, llama, logits, make, same, theta_d, trained
from analysis.capabilities.texts import labelled, plain, preferences, prompts, tokenizer

TRL = "TRL"


def _fits(trainer_class: Any, config_class: Any, model: Any, data: Any, folder: Path, **options: Any) -> Any:
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
    check(not torch.equal(theta_d(trainer.model), before), "theta_d did not move")
    for name, parameter in trainer.model.named_parameters():
        check(name not in frozen or torch.equal(parameter, frozen[name]), f"{name} is frozen and moved")
    return trainer


@probe(TRL, "`SFTTrainer(peft_config=...)`", slow=True)
def _(folder: Path) -> None:
    _fits(SFTTrainer, SFTConfig, llama(), plain(), folder, peft_config=config(), max_length=8)


@probe(TRL, "`SFTTrainer` with an adapted model, packing", slow=True)
def _(folder: Path) -> None:
    _fits(SFTTrainer, SFTConfig, adapted(), plain(), folder, max_length=8, packing=True, packing_strategy="wrapped")


@probe(TRL, "`SFTTrainer(peft_config=...)` on a 4-bit base", slow=True)
def _(folder: Path) -> str:
    base = quantised(folder, "4 bits (NF4)")
    trainer = _fits(SFTTrainer, SFTConfig, base, plain(), folder / "run", peft_config=config(), max_length=8)
    return f"TRL rounds theta_d of quantised bases to {str(theta_d(trainer.model).dtype)[6:]}"


@probe(TRL, "`DPOTrainer(peft_config=...)`: the bare base is the reference", slow=True)
def _(folder: Path) -> None:
    trainer = _fits(DPOTrainer, DPOConfig, llama(), preferences(), folder, peft_config=config())
    check(trainer.ref_model is None, "a second model is held")
    with trainer.model.disable_adapter():
        same(logits(trainer.model), logits(llama()), "logits of the reference")


@probe(TRL, "`DPOTrainer` with a fresh adapter: its start is the reference", slow=True)
def _(folder: Path) -> None:
    trainer = _fits(DPOTrainer, DPOConfig, adapted(), preferences(), folder)
    same(theta_d(trainer.model, "ref"), theta_d(adapted()), "theta_d of the reference")


@probe(TRL, "`DPOTrainer` with a trained adapter as its own reference", slow=True)
def _(folder: Path) -> None:
    _fits(DPOTrainer, DPOConfig, trained(), preferences(), folder)


@probe(TRL, "`DPOTrainer` with a trained adapter, and a merged copy as `ref_model`", slow=True)
def _(folder: Path) -> None:
    _fits(DPOTrainer, DPOConfig, trained(), preferences(), folder, ref_model=trained().merge_and_unload())


@probe(TRL, "`KTOTrainer(peft_config=...)`", slow=True)
def _(folder: Path) -> None:
    _fits(KTOTrainer, KTOConfig, llama(), labelled(), folder, peft_config=config())


@probe(TRL, "`RewardTrainer(peft_config=...)`", slow=True)
def _(folder: Path) -> None:
    settings = llama().config
    settings.num_labels, settings.pad_token_id = 1, 0
    base = make(LlamaForSequenceClassification, settings)
    fields = config(task_type="SEQ_CLS", modules_to_save=["score"])
    _fits(RewardTrainer, RewardConfig, base, preferences(), folder, peft_config=fields, max_length=12)


def _reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


@probe(TRL, "`GRPOTrainer(peft_config=...)`", slow=True)
def _(folder: Path) -> None:
    options = {"num_generations": 4, "max_completion_length": 6, "reward_funcs": _reward, "beta": 0.1}
    _fits(GRPOTrainer, GRPOConfig, llama(), prompts(), folder, peft_config=config(), **options)


@probe(TRL, "`RLOOTrainer(peft_config=...)`", slow=True)
def _(folder: Path) -> None:
    options = {"num_generations": 4, "max_completion_length": 6, "reward_funcs": _reward, "beta": 0.1}
    _fits(RLOOTrainer, RLOOConfig, llama(), prompts(), folder, peft_config=config(), **options)
