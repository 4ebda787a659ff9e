"""The PEFT and Transformers features a user knows: each works as with LoRA, or refuses with a sentence."""

from collections import Counter

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import BitsAndBytesConfig  # noqa: F401  (the import must not disturb the tuner)

from tests.tuner.models import base_model, batch, config, train_steps
from uniproj import Projection, ProjectionError, get
from uniproj.tuner import adapter_of


@pytest.mark.parametrize("projection", ["unilora", "fastfood", "lora_xs"])
def test_autocast_rounds_theta_D_once_and_not_P(projection: str) -> None:
    model = get_peft_model(base_model("llama"), config("llama", projection, None if projection == "lora_xs" else 60))
    P, theta_d = adapter_of(model)
    B = model.base_model.model.model.layers[0].mlp.down_proj.lora_B["default"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch("llama"))
        assert torch.equal(B.weight, P.layout.split(P(theta_d).bfloat16())[0])
    model(**batch("llama"))
    assert torch.equal(B.weight, P.layout.split(P(theta_d))[0])


@pytest.fixture
def applied(monkeypatch) -> Counter:
    """How often P (`_matvec`) and its adjoint (`_rmatvec`) are applied."""
    counts: Counter = Counter()
    for name in ("_matvec", "_rmatvec"):
        original = getattr(get("unilora"), name)

        def counted(self, x, dtype, name=name, original=original):
            counts[name] += 1
            return original(self, x, dtype)

        monkeypatch.setattr(get("unilora"), name, counted)
    monkeypatch.setattr(get("unilora"), "_of_one", Projection._of_one)
    return counts


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generate_projects_once_and_equals_the_merged_model(kind: str, applied: Counter) -> None:
    model = get_peft_model(base_model(kind), config(kind))
    train_steps(model, kind)
    model.eval()
    inputs = {k: v for k, v in batch(kind).items() if k != "labels"}
    sampling = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    applied.clear()
    tokens = model.generate(**inputs, **sampling)
    assert applied == {"_matvec": 1}
    assert torch.equal(model.merge_and_unload().generate(**inputs, **sampling), tokens)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_projects_once_per_forward(checkpointing: bool, applied: Counter) -> None:
    model = get_peft_model(base_model("llama"), config("llama")).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    train_steps(model, "llama", 3)
    assert applied == {"_matvec": 3, "_rmatvec": 3}


def test_inference_mode_does_not_poison_training() -> None:
    model = get_peft_model(base_model("llama"), config("llama"))
    with torch.inference_mode():
        model(**batch("llama"))
    losses = train_steps(model, "llama")
    assert losses[-1] < losses[0]


def test_several_adapters_do_not_touch_each_other(tmp_path) -> None:
    model = get_peft_model(base_model("llama"), config("llama", d=60))
    first = adapter_of(model).theta_d.detach().clone()
    other = config("llama", "fastfood", 31, r=2, target_modules=["v_proj", "gate_proj"], projection_seed=5)
    model.add_adapter("other", other)
    assert model.active_adapters == ["default"]
    model.set_adapter("other")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["base_model.uniproj_theta_d.other"]
    train_steps(model, "llama")
    assert torch.equal(adapter_of(model).theta_d, first)

    logits = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        logits[name] = model(**batch("llama")).logits.detach()
    model.save_pretrained(tmp_path)
    alone = get_peft_model(base_model("llama"), config("llama", d=60)).eval()
    assert torch.equal(alone(**batch("llama")).logits, logits["default"])
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path / "other")
    assert torch.equal(loaded(**batch("llama")).logits, logits["other"])
    loaded.load_adapter(tmp_path, "default2")
    loaded.set_adapter("default2")
    assert torch.equal(loaded(**batch("llama")).logits, logits["default"])

    model.base_model.set_adapter(["default", "other"])
    both = model(**batch("llama")).logits
    assert not torch.equal(both, logits["default"]) and not torch.equal(both, logits["other"])
    model.set_adapter("default")
    model.delete_adapter("other")
    assert list(model.base_model.projections) == ["default"]
    assert torch.equal(model(**batch("llama")).logits, logits["default"])


def test_attaching_draws_nothing_from_the_callers_random_stream() -> None:
    model = base_model("llama")
    before = torch.get_rng_state()
    get_peft_model(model, config("llama"))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_order_of_registration_does_not_matter(tmp_path) -> None:
    model = get_peft_model(base_model("llama"), config("llama")).eval()
    model.save_pretrained(tmp_path)
    shuffled = base_model("llama")
    for layer in shuffled.model.layers:
        attention = layer.self_attn
        attention._modules = dict(reversed(list(attention._modules.items())))
    again = PeftModel.from_pretrained(shuffled, tmp_path)
    assert torch.equal(again(**batch("llama")).logits, model(**batch("llama")).logits)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"d": None}, ProjectionError, "d is free"),
        ({"d": 10**6}, ProjectionError, "d must lie in"),
        ({"projection_kwargs": {"topk": 2}}, ProjectionError, "unknown hyperparameters"),
        ({"target_modules": ["q_proj", "input_layernorm"]}, ValueError, "LlamaRMSNorm"),
    ],
)
def test_a_refused_adapter_leaves_the_model_as_it_was(change, error, message) -> None:
    model = base_model("llama")
    names, before = [n for n, _ in model.named_modules()], model(**batch("llama")).logits
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        get_peft_model(model, config("llama", **change))
    assert [n for n, _ in model.named_modules()] == names
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(model(**batch("llama")).logits, before)


def test_a_refused_second_adapter_leaves_the_first_working() -> None:
    model = get_peft_model(base_model("llama"), config("llama")).eval()
    before = model(**batch("llama")).logits
    with pytest.raises(ProjectionError, match="d must lie in"):
        model.add_adapter("other", config("llama", d=10**6))
    assert torch.equal(model(**batch("llama")).logits, before)
    assert list(model.peft_config) == ["default"]
