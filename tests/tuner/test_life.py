"""Attach, train, save, load, merge, unload: every projection, and every kind of model (BERT, Llama, GPT-2)."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model

from tests.tuner.models import base_model, batch, config, train_steps
from uniproj import get, names
from uniproj.tuner import adapter_of

KINDS = ("bert", "llama", "gpt2")
# every projection on one of the kinds in turn; a fixed P, one of base weights and a learned one on all of them
LIVES = {(name, KINDS[i % 3]) for i, name in enumerate(names())}
LIVES |= {(name, kind) for name in ("unilora", "lora_xs", "vblora") for kind in KINDS}


def _reference(model: PeftModel, kind: str, name: str = "default") -> torch.Tensor:
    """Logits of the base model with W + s B A written into its weights: what any LoRA must give."""
    reference = base_model(kind)
    projection, theta_d = adapter_of(model, name)
    theta_D = projection(theta_d).detach()
    factors = iter(projection.layout.split(theta_D))
    for module in projection.layout.modules:
        B, A = next(factors), next(factors)
        layer = reference.get_submodule(module)
        delta = model.base_model.model.get_submodule(module).scaling[name] * (B @ A)
        layer.weight.data += delta.T if kind == "gpt2" else delta
    if kind == "bert":  # its head is trained too
        reference.classifier.load_state_dict(model.base_model.model.classifier.modules_to_save[name].state_dict())
    return reference(**batch(kind)).logits


@pytest.mark.parametrize(("projection", "kind"), sorted(LIVES))
def test_whole_life(projection: str, kind: str, tmp_path) -> None:
    untouched = base_model(kind)(**batch(kind)).logits
    model = get_peft_model(base_model(kind), config(kind, projection, 60 if get(projection).free_d else None))
    losses = train_steps(model, kind)
    assert losses[-1] < losses[0]
    model.eval()
    logits = model(**batch(kind)).logits
    torch.testing.assert_close(logits, _reference(model, kind), rtol=1e-4, atol=1e-4)

    with model.disable_adapter():
        if kind != "bert":  # the classification head of BERT is trained too
            assert torch.equal(model(**batch(kind)).logits, untouched)
    assert torch.equal(model(**batch(kind)).logits, logits)

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model(kind), tmp_path).eval()
    assert torch.equal(again(**batch(kind)).logits, logits)
    assert not any(p.requires_grad for p in again.parameters())
    continued = PeftModel.from_pretrained(base_model(kind), tmp_path, is_trainable=True)
    assert train_steps(continued, kind, 1)[0] == pytest.approx(model(**batch(kind)).loss.item(), rel=1e-5)

    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(**batch(kind)).logits, logits, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert torch.equal(model.unload()(**batch(kind)).logits, untouched) or kind == "bert"


def test_the_file_holds_the_trained_numbers_and_little_else(tmp_path) -> None:
    model = get_peft_model(base_model("llama"), config("llama", d=200))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size <= 4 * 200 + 4096
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "UNIPROJ"
    assert saved["layout_fingerprint"] == adapter_of(model).P.layout.fingerprint


def test_merge_sees_an_edit_through_data() -> None:
    model = get_peft_model(base_model("llama"), config("llama")).eval()
    with torch.no_grad():
        model(**batch("llama"))
    adapter_of(model).theta_d.data.mul_(7.0)  # leaves the version counter alone
    with torch.no_grad():
        logits = model(**batch("llama")).logits
    torch.testing.assert_close(logits, _reference(model, "llama"), rtol=1e-4, atol=1e-4)
    adapter_of(model).theta_d.data.mul_(0.5)
    expected = _reference(model, "llama")
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**batch("llama")).logits, expected, rtol=1e-4, atol=1e-4)
