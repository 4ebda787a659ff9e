"""Transformers: the Trainer, generation, pipelines, compilation, and its own adapter methods."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    pipeline,
)

from analysis.capabilities.probe import check, probe
from analysis.capabilities.subjects import (
    IDS,
    ROUNDING,
    adapted,
    config,
    gradient,
    llama,
    logits,
    make,
    same,
    saved,
    saved_llama,
    theta_d,
    trained,
)
from analysis.capabilities.texts import tokenizer

TRANSFORMERS = "Transformers"
ROWS = 16


def _data() -> Dataset:
    ids = torch.randint(0, 64, (ROWS, 9), generator=torch.Generator().manual_seed(4)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def _trainer(folder: Path, model: Any = None, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.02, "logging_steps": 1, "report_to": [],
        "seed": 1, "disable_tqdm": True, "use_cpu": True, "save_strategy": "no",
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **{**settings, **options})
    model = adapted(lora_dropout=0.1) if model is None else model
    return Trainer(model, arguments, train_dataset=_data(), eval_dataset=_data())


def _falls(trainer: Trainer) -> None:
    before = theta_d(trainer.model).detach().clone()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    check(min(losses[1:]) < losses[0], f"the loss did not fall: {losses}")
    check(not torch.equal(theta_d(trainer.model), before), "theta_d did not move")


@probe(TRANSFORMERS, "`Trainer`: train, save, resume", slow=True)
def _(folder: Path) -> str:
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = _trainer(folder, **saving)
    whole.train()
    resumed = _trainer(folder, **saving)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    same(theta_d(resumed.model), theta_d(whole.model), "theta_d of the resumed run")
    again = PeftModel.from_pretrained(llama(), folder / "checkpoint-4")
    same(logits(again), logits(whole.model.eval()), "logits of the last checkpoint")
    return "a resumed run equals an uninterrupted one to the last bit"


@probe(TRANSFORMERS, "`Trainer`: `load_best_model_at_end`", slow=True)
def _(folder: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = _trainer(folder, adapted(), load_best_model_at_end=True, learning_rate=1.0, **options)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = PeftModel.from_pretrained(llama(), folder / f"checkpoint-{min(losses, key=losses.__getitem__)}")
    same(theta_d(trainer.model), theta_d(best), "theta_d of the best checkpoint")


@probe(TRANSFORMERS, "`Trainer`: `gradient_accumulation_steps`", slow=True)
def _(folder: Path) -> None:
    options: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-3, "optim": "sgd"}
    whole = _trainer(folder, adapted(), per_device_train_batch_size=8, **options)
    parts = _trainer(folder, adapted(), per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    whole.train(), parts.train()
    same(theta_d(parts.model), theta_d(whole.model), "theta_d after four parts of a batch", 1e-5)


@probe(TRANSFORMERS, "`Trainer`: label smoothing", slow=True)
def _(folder: Path) -> None:
    _falls(_trainer(folder, label_smoothing_factor=0.1))


@probe(TRANSFORMERS, "`Trainer`: bfloat16, gradient checkpointing", slow=True)
def _(folder: Path) -> None:
    options = {"bf16": True, "gradient_checkpointing": True}
    _falls(_trainer(folder, gradient_checkpointing_kwargs={"use_reentrant": False}, **options))


@probe(TRANSFORMERS, "`Trainer`: NEFTune noise", slow=True)
def _(folder: Path) -> None:
    _falls(_trainer(folder, neftune_noise_alpha=0.1))


@probe(TRANSFORMERS, "`Trainer`: `save_model`, evaluate, predict", slow=True)
def _(folder: Path) -> None:
    trainer = _trainer(folder)
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    predictions = torch.as_tensor(trainer.predict(_data()).predictions)
    again, ids = PeftModel.from_pretrained(llama(), folder / "saved"), torch.tensor(_data()["input_ids"][:])
    same(logits(again, ids), predictions, "predictions of the saved adapter", ROUNDING)


@probe(TRANSFORMERS, "`push_to_hub`: the folder that is uploaded loads")
def _(folder: Path) -> None:
    model, uploaded = trained(), folder / "uploaded"

    class Hub:
        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, operations: list[Any], **_: Any) -> None:
            uploaded.mkdir()
            for operation in operations:
                (uploaded / operation.path_in_repo).write_bytes(Path(operation.path_or_fileobj).read_bytes())

    card = patch("transformers.utils.hub.create_and_tag_model_card", return_value=ModelCard("---\n---\n"))
    with card, patch("transformers.utils.hub.hf_api", Hub):
        model.push_to_hub("someone/adapter")
    same(logits(PeftModel.from_pretrained(llama(), uploaded)), logits(model), "logits")


@probe(TRANSFORMERS, "`Seq2SeqTrainer` with `predict_with_generate`", slow=True)
def _(folder: Path) -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    base = make(T5ForConditionalGeneration, T5Config(vocab_size=64, decoder_start_token_id=0, **sizes))
    model = adapted(base, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    arguments = Seq2SeqTrainingArguments(
        str(folder), max_steps=2, predict_with_generate=True, report_to=[], use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=4, save_strategy="no", generation_max_length=6,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(model, arguments, train_dataset=_data(), eval_dataset=_data())
    trainer.train()
    check(trainer.predict(_data()).predictions.shape[0] == ROWS, "not one prediction per row")


@probe(TRANSFORMERS, "gradient checkpointing, non-reentrant")
def _(folder: Path) -> None:
    model = adapted().train()
    plain = gradient(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    same(gradient(model), plain, "gradient", ROUNDING)


@probe(TRANSFORMERS, "gradient checkpointing, reentrant: fixed P on one process")
def _(folder: Path) -> None:
    model = adapted().train()
    plain = gradient(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    same(gradient(model), plain, "gradient", ROUNDING)


@probe(TRANSFORMERS, "gradient checkpointing, reentrant: learned P (VB-LoRA)")
def _(folder: Path) -> None:
    model = adapted(projection="vblora", d=None).train()
    plain = gradient(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    same(gradient(model), plain, "gradient", ROUNDING)


@probe(TRANSFORMERS, "autocast in bfloat16: theta_d and its gradient stay float32")
def _(folder: Path) -> str:
    model = adapted()
    exact = gradient(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = gradient(model)
    check(theta_d(model).dtype == rounded.dtype == torch.float32, "not float32")
    return f"cosine of the gradients {torch.cosine_similarity(exact, rounded, dim=0):.4f}"


@probe(TRANSFORMERS, "`generate`: greedy, sampling, beams")
def _(folder: Path) -> None:
    model = trained()
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


@probe(TRANSFORMERS, "`pipeline()` with a `PeftModel`")
def _(folder: Path) -> None:
    model = trained()
    written = pipeline("text-generation", model=model, tokenizer=tokenizer(), trust_remote_code=False)(
        "a b c", max_new_tokens=4, do_sample=False, return_full_text=False
    )
    ids = tokenizer()("a b c", return_tensors="pt")["input_ids"]
    expected = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    check(written[0]["generated_text"].split() == tokenizer().decode(expected).split(), "the pipeline writes otherwise")


@probe(TRANSFORMERS, "`pipeline()` with the folder of an adapter")
def _(folder: Path) -> None:
    path, _ = saved(folder, AutoModelForCausalLM.from_pretrained(saved_llama(folder), trust_remote_code=False))
    pipeline("text-generation", model=str(path), tokenizer=tokenizer(), trust_remote_code=False)


@probe(TRANSFORMERS, "`AutoModelForCausalLM.from_pretrained` with the folder of an adapter")
def _(folder: Path) -> None:
    path, expected = saved(folder, AutoModelForCausalLM.from_pretrained(saved_llama(folder), trust_remote_code=False))
    same(logits(AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)), expected, "logits")


@probe(TRANSFORMERS, "`PreTrainedModel.add_adapter` (PeftAdapterMixin)")
def _(folder: Path) -> None:
    llama().add_adapter(config())


@probe(TRANSFORMERS, "`PreTrainedModel.load_adapter` (PeftAdapterMixin)")
def _(folder: Path) -> None:
    path, expected = saved(folder)
    base = llama()
    base.load_adapter(str(path))
    same(logits(base), expected, "logits")


@probe(TRANSFORMERS, "`torch.compile(fullgraph=True)`: training (traced; no code generator)", slow=True)
def _(folder: Path) -> None:
    torch._dynamo.reset()
    model = adapted()
    expected = gradient(model)
    model.zero_grad()
    torch.compile(model, backend="eager", fullgraph=True)(input_ids=IDS, labels=IDS).loss.backward()
    same(theta_d(model).grad, expected, "gradient", ROUNDING)  # type: ignore[arg-type]


@probe(TRANSFORMERS, "`resize_token_embeddings` of an adapted model")
def _(folder: Path) -> None:
    model = trained()
    expected = logits(model)
    model.resize_token_embeddings(70)
    same(logits(model)[..., :64], expected, "logits of the old tokens", 1e-6)
