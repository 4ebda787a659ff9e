"""Transformers: the Trainer, generation, pipelines, compilation, and its own adapter methods."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    pipeline,
)

from tests.compatibility.subjects import (
    IDS,
    ROUNDING,
    Remark,
    adapted,
    bert,
    config,
    gpt2,
    gradient,
    llama,
    logits,
    same,
    saved,
    saved_llama,
    steps,
    t5,
    theta_d,
    trained_model,
)
from tests.compatibility.texts import tokenizer
from tests.uploads import stand_in

capability = partial(pytest.mark.capability, "Transformers")
ROWS = 16


def _data(classes: int | None = None) -> Dataset:
    ids = torch.randint(0, 64, (ROWS, 9), generator=torch.Generator().manual_seed(4))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % classes if classes else ids).tolist()})


def _trainer(folder: Path, model: Any = None, classes: int | None = None, **options: Any) -> Trainer:
    common: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.02, "logging_steps": 1, "report_to": [],
        "seed": 1, "disable_tqdm": True, "use_cpu": True, "save_strategy": "no",
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **{**common, **options})
    model = adapted(lora_dropout=0.1) if model is None else model
    return Trainer(model, arguments, train_dataset=_data(classes), eval_dataset=_data(classes))


@capability("`Trainer`: train, save, resume")
def test_trainer_train_save_resume(tmp_path: Path, remark: Remark) -> None:
    def trainer() -> Trainer:
        """Of theta_d, a learned P and a head."""
        fields = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "lora_dropout": 0.1}
        model = adapted(bert(), projection="vblora", d=None, **fields)
        return _trainer(tmp_path, model, classes=3, save_strategy="steps", save_steps=2)

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, found), expected in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(found, expected), name
    again = PeftModel.from_pretrained(bert(), tmp_path / "checkpoint-4")
    same(logits(again), logits(whole.model.eval()), "logits of the last checkpoint")
    remark("a resumed run equals an uninterrupted one to the last bit")


@capability("`Trainer`: `load_best_model_at_end`")
def test_trainer_load_best_model_at_end(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = _trainer(tmp_path, adapted(), load_best_model_at_end=True, learning_rate=1.0, **options)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = PeftModel.from_pretrained(llama(), tmp_path / f"checkpoint-{min(losses, key=losses.__getitem__)}")
    same(theta_d(trainer.model), theta_d(best), "theta_d of the best checkpoint")


@capability("`Trainer`: `gradient_accumulation_steps`")
def test_trainer_gradient_accumulation_steps(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-3, "optim": "sgd"}
    whole = _trainer(tmp_path, adapted(), per_device_train_batch_size=8, **options)
    parts = _trainer(tmp_path, adapted(), per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    whole.train(), parts.train()
    same(theta_d(parts.model), theta_d(whole.model), "theta_d after four parts of a batch", 1e-5)


_CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"label_smoothing_factor": 0.1}, marks=capability("`Trainer`: label smoothing")),
        pytest.param({"bf16": True, **_CHECKPOINTING}, marks=capability("`Trainer`: bfloat16, gradient checkpointing")),
        pytest.param({"neftune_noise_alpha": 0.1}, marks=capability("`Trainer`: NEFTune noise")),
    ],
)
def test_the_loss_falls_with(options: dict[str, Any], tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, **options)
    before = theta_d(trainer.model).detach().clone()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert min(losses[1:]) < losses[0]
    assert not torch.equal(theta_d(trainer.model), before)


@capability("`Trainer`: `save_model`, evaluate, predict")
def test_trainer_save_model_evaluate_predict(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    predictions = torch.as_tensor(trainer.predict(_data()).predictions)
    again, ids = PeftModel.from_pretrained(llama(), tmp_path / "saved"), torch.tensor(_data()["input_ids"][:])
    same(logits(again, ids), predictions, "predictions of the saved adapter", ROUNDING)


@capability("`push_to_hub`: the folder that is uploaded loads")
def test_push_to_hub_the_folder_that_is_uploaded_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_model()
    stand_in(tmp_path, monkeypatch)
    model.push_to_hub("someone/adapter")
    same(logits(PeftModel.from_pretrained(llama(), "someone/adapter")), logits(model), "logits")


@capability("`Seq2SeqTrainer` with `predict_with_generate`")
def test_seq2seqtrainer_with_predict_with_generate(tmp_path: Path) -> None:
    model = adapted(t5(), target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=2, predict_with_generate=True, report_to=[], use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=4, save_strategy="no", generation_max_length=6,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(model, arguments, train_dataset=_data(), eval_dataset=_data())
    trainer.train()
    assert trainer.predict(_data()).predictions.shape[0] == ROWS


def _checkpointed(use_reentrant: bool, base: Any, labels: Tensor = IDS, **fields: Any) -> None:
    """The gradients of all that is trained are those without checkpointing."""
    model = adapted(base, **fields).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=IDS, labels=labels).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert model.base_model.model.is_gradient_checkpointing
    checkpointed = gradients()
    assert checkpointed.keys() == plain.keys()
    for name, expected in plain.items():
        same(checkpointed[name], expected, name, ROUNDING)


def _checkpointed_architectures(use_reentrant: bool) -> None:
    _checkpointed(use_reentrant, llama())
    _checkpointed(use_reentrant, gpt2(), target_modules=["c_attn", "c_proj"])
    _checkpointed(use_reentrant, bert(), IDS[:, 0] % 3, target_modules=["query", "value"], task_type="SEQ_CLS")


@capability("gradient checkpointing, non-reentrant")
def test_gradient_checkpointing_non_reentrant() -> None:
    _checkpointed_architectures(use_reentrant=False)


@capability("gradient checkpointing, reentrant: fixed P on one process")
def test_gradient_checkpointing_reentrant_fixed_p_on_one_process() -> None:
    _checkpointed_architectures(use_reentrant=True)


@capability("gradient checkpointing, reentrant: learned P (VB-LoRA)")
def test_gradient_checkpointing_reentrant_learned_p_vb_lora() -> None:
    for use_reentrant in (False, True):
        _checkpointed(use_reentrant, llama(), projection="vblora", d=None)


@capability("autocast in bfloat16: theta_d and its gradient stay float32")
def test_autocast_in_bfloat16_theta_d_and_its_gradient_stay_float32(remark: Remark) -> None:
    model = adapted()
    exact = gradient(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    rounded = theta_d(model).grad
    assert theta_d(model).dtype == rounded.dtype == torch.float32
    cosine = torch.cosine_similarity(exact, rounded, dim=0)
    assert cosine > 0.99
    remark(f"cosine of the gradients {cosine:.4f}")


@capability("`generate`: greedy, sampling, beams")
def test_generate_greedy_sampling_beams() -> None:
    model = trained_model()
    options: dict[str, Any] = {"max_new_tokens": 6, "pad_token_id": 0}
    ways: list[dict[str, Any]] = [{"do_sample": False}, {"do_sample": True}, {"num_beams": 3}]
    tokens = []
    for way in ways:
        torch.manual_seed(0)
        tokens.append(model.generate(input_ids=IDS, **options, **way))
    merged = model.merge_and_unload()
    for way, expected in zip(ways, tokens, strict=True):
        torch.manual_seed(0)
        same(merged.generate(input_ids=IDS, **options, **way), expected, f"tokens of the merged model, {way}")


@capability("`pipeline()` with a `PeftModel`")
def test_pipeline_with_a_peftmodel() -> None:
    model = trained_model()
    written = pipeline("text-generation", model=model, tokenizer=tokenizer(), trust_remote_code=False)(
        "a b c", max_new_tokens=4, do_sample=False, return_full_text=False
    )
    ids = tokenizer()("a b c", return_tensors="pt")["input_ids"]
    expected = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert written[0]["generated_text"].split() == tokenizer().decode(expected).split()


@capability("`pipeline()` with the folder of an adapter")
def test_pipeline_with_the_folder_of_an_adapter(tmp_path: Path) -> None:
    path, expected = _saved_beside_its_base(tmp_path)
    pipe = pipeline("text-generation", model=path, tokenizer=tokenizer(), trust_remote_code=False)
    same(logits(pipe.model), expected, "logits")
    assert pipe("a b c", max_new_tokens=4, do_sample=False)


@capability("`AutoModelForCausalLM.from_pretrained` with the folder of an adapter")
def test_automodelforcausallm_from_pretrained_with_the_folder_of_an_adapter(tmp_path: Path) -> None:
    path, expected = _saved_beside_its_base(tmp_path)
    same(logits(AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)), expected, "logits")


def _saved_beside_its_base(folder: Path) -> tuple[str, Tensor]:
    base = AutoModelForCausalLM.from_pretrained(saved_llama(folder), trust_remote_code=False)
    path, expected = saved(folder, base)
    return str(path), expected


@capability("`PreTrainedModel.add_adapter`, `save_pretrained`, `load_adapter` (PeftAdapterMixin)")
def test_pretrainedmodel_add_adapter_save_pretrained_load_adapter(tmp_path: Path) -> None:
    model = llama()
    model.add_adapter(config())
    steps(model)
    model.eval().save_pretrained(tmp_path)
    loaded = llama()
    loaded.load_adapter(str(tmp_path))
    same(logits(loaded), logits(model), "logits")
    same(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model), "logits of a PeftModel")


@capability("`set_adapter`, `disable_adapters`, `enable_adapters`, `delete_adapter` (PeftAdapterMixin)")
def test_set_adapter_disable_adapters_enable_adapters_delete_adapter(tmp_path: Path) -> None:
    path, first = saved(tmp_path)
    model = llama()
    model.load_adapter(str(path), "first")
    model.add_adapter(config(init_seed=1), "second")
    second = logits(model)
    model.set_adapter("first")
    same(logits(model), first, "logits of the first")
    model.disable_adapters()
    same(logits(model), logits(llama()), "logits of the base")
    model.enable_adapters()
    model.delete_adapter("first")
    same(logits(model), second, "logits of the second")


@capability("`torch.compile(fullgraph=True)`: training (traced; no code generator)")
def test_torch_compile_fullgraph_true_training_traced_no_code_generator() -> None:
    torch._dynamo.reset()
    model = adapted(llama(num_hidden_layers=1))
    expected = gradient(model)
    model.zero_grad()
    torch.compile(model, backend="eager", fullgraph=True)(input_ids=IDS, labels=IDS).loss.backward()
    same(theta_d(model).grad, expected, "gradient", ROUNDING)  # type: ignore[arg-type]


@capability("`resize_token_embeddings` of an adapted model")
def test_resize_token_embeddings_of_an_adapted_model() -> None:
    model = trained_model()
    expected = logits(model)
    model.resize_token_embeddings(70)
    same(logits(model)[..., :64], expected, "logits of the old tokens", 1e-6)
