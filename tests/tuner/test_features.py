"""The PEFT and Transformers features a user knows: each works as with LoRA, or refuses with a sentence."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig  # noqa: F401  (the import must not disturb the tuner)

from tests.tuner.models import base_model, batch, config, train_steps
from uniproj import AdapterError, ProjectionError
from uniproj.tuner import UniProjConfig, adapter_of


def _gradients(model: torch.nn.Module, kind: str = "llama") -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch(kind)).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_gradient_checkpointing_gives_the_same_gradients(kind: str, use_reentrant: bool) -> None:
    model = get_peft_model(base_model(kind), config(kind)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = _gradients(model, kind)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert model.base_model.model.is_gradient_checkpointing
    checkpointed = _gradients(model, kind)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_a_learned_projection(use_reentrant: bool) -> None:
    model = get_peft_model(base_model("llama"), config("llama", "vblora", None)).train()
    plain = _gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for name, gradient in _gradients(model).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_trains_in_float32() -> None:
    model = get_peft_model(base_model("llama"), config("llama"))
    exact = _gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch("llama")).loss
    model.zero_grad()
    loss.backward()
    theta_d = adapter_of(model).theta_d
    assert theta_d.dtype == theta_d.grad.dtype == torch.float32
    (gradient,) = exact.values()
    assert torch.cosine_similarity(theta_d.grad, gradient, dim=0) > 0.99


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


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_factors_have_the_dtype_that_peft_gives_lora(autocast_adapter_dtype: bool) -> None:
    def first_A(chosen) -> torch.Tensor:
        model = get_peft_model(base_model("llama").bfloat16(), chosen, autocast_adapter_dtype=autocast_adapter_dtype)
        model(**batch("llama"))
        return model.base_model.model.model.layers[0].mlp.down_proj.lora_A["default"].weight

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    assert first_A(config("llama")).dtype == first_A(lora).dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_keeps_an_exact_P(dtype: torch.dtype) -> None:
    model = get_peft_model(base_model("llama").to(dtype), config("llama"))
    P = adapter_of(model).P
    M = P.to_dense()
    assert (M.T @ M - torch.eye(P.d)).abs().max() < 1e-12
    assert adapter_of(model).theta_d.dtype == torch.float32
    losses = train_steps(model, "llama", 4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generate_projects_once_and_equals_the_merged_model(kind: str, monkeypatch) -> None:
    model = get_peft_model(base_model(kind), config(kind))
    train_steps(model, kind)
    model.eval()
    projection = adapter_of(model).P
    calls = []
    original = type(projection)._matvec
    monkeypatch.setattr(type(projection), "_matvec", lambda self, x, dtype: calls.append(1) or original(self, x, dtype))
    inputs = {k: v for k, v in batch(kind).items() if k != "labels"}
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(**inputs, **settings)
    assert len(calls) == 1
    assert torch.equal(model.merge_and_unload().generate(**inputs, **settings), tokens)


def test_training_projects_once_per_forward(monkeypatch) -> None:
    model = get_peft_model(base_model("llama"), config("llama"))
    projection = adapter_of(model).P
    calls = {"forward": 0, "adjoint": 0}
    for way, method in (("forward", "_matvec"), ("adjoint", "_rmatvec")):
        original = getattr(type(projection), method)

        def counted(self, x, dtype, way=way, original=original):
            calls[way] += 1
            return original(self, x, dtype)

        monkeypatch.setattr(type(projection), method, counted)
    train_steps(model, "llama", 3)
    assert calls == {"forward": 3, "adjoint": 3}


def test_checkpointed_layers_take_the_factors_of_their_forward(monkeypatch) -> None:
    model = get_peft_model(base_model("llama"), config("llama")).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    projection = type(adapter_of(model).P)
    original = projection._matvec
    monkeypatch.setattr(projection, "_matvec", lambda self, x, dtype: calls.append(1) or original(self, x, dtype))
    train_steps(model, "llama", 3)
    assert len(calls) == 3


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


def test_mixed_batches_through_adapter_names() -> None:
    model = get_peft_model(base_model("llama"), config("llama")).eval()
    model.add_adapter("other", config("llama", "vera", None))
    adapter_of(model, "other").theta_d.data.normal_(generator=torch.Generator().manual_seed(0))
    inputs = {k: v for k, v in batch("llama").items() if k != "labels"}
    mixed = model(**inputs, adapter_names=["default", "other", "__base__"]).logits
    for row, name in enumerate(("default", "other")):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], model(**inputs).logits[row], rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(mixed[2], model(**inputs).logits[2], rtol=1e-4, atol=1e-5)


def test_modules_to_save_and_the_head_are_trained_and_saved(tmp_path) -> None:
    model = get_peft_model(base_model("bert"), config("bert", modules_to_save=["pooler"]))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("pooler" in n for n in trained) and any("classifier" in n for n in trained)
    train_steps(model, "bert")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model("bert"), tmp_path)
    assert torch.equal(again.eval()(**batch("bert")).logits, model.eval()(**batch("bert")).logits)


def test_rank_and_alpha_patterns_shape_the_layout() -> None:
    fields = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 8}}
    model = get_peft_model(base_model("llama"), config("llama", **fields))
    layout = adapter_of(model).P.layout
    ranks = {m.rsplit(".", 1)[-1]: layout.block(m, "A").shape[0] for m in layout.modules}
    assert ranks == {"q_proj": 4, "v_proj": 2, "down_proj": 4}
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 2.0
    rs = get_peft_model(base_model("llama"), config("llama", use_rslora=True, lora_alpha=4))
    assert rs.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == 2.0


def test_dropout_acts_in_training_only() -> None:
    model = get_peft_model(base_model("llama"), config("llama", lora_dropout=0.5))
    adapter_of(model).theta_d.data.mul_(50)
    model.train()
    assert not torch.equal(model(**batch("llama")).logits, model(**batch("llama")).logits)
    model.eval()
    assert torch.equal(model(**batch("llama")).logits, model(**batch("llama")).logits)


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


def test_torch_compile_trains_without_graph_breaks() -> None:
    torch._dynamo.reset()
    model = get_peft_model(base_model("llama"), config("llama"))
    expected = _gradients(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    model.zero_grad()
    compiled(**batch("llama")).loss.backward()
    (gradient,) = expected.values()
    torch.testing.assert_close(adapter_of(model).theta_d.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"target_parameters": ["weight"]}, "target_parameters"),
        ({"lora_bias": True}, "lora_bias"),
        ({"projection_kwargs": {"x": object()}}, "projection_kwargs must be JSON"),
    ],
)
def test_lora_variants_are_refused(fields, message) -> None:
    with pytest.raises(AdapterError, match=message):
        UniProjConfig(d=8, **fields)


def test_unknown_projection_names_the_known_ones() -> None:
    with pytest.raises(ProjectionError, match=r"unknown projection 'uni_lora'.*Did you mean 'unilora'"):
        UniProjConfig(projection="uni_lora", d=8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"d": None}, ProjectionError, "d is free"),
        ({"d": 10**6}, ProjectionError, "d must lie in"),
        ({"projection_kwargs": {"topk": 2}}, ProjectionError, "unknown hyperparameters"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, AdapterError, "adapts linear layers, got Embedding"),
    ],
)
def test_a_refused_adapter_leaves_the_model_as_it_was(change, error, message) -> None:
    model = base_model("llama")
    names, before = [n for n, _ in model.named_modules()], model(**batch("llama")).logits
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        get_peft_model(model, config("llama", **change))
    assert [n for n, _ in model.named_modules()] == names
    assert [p.requires_grad for p in model.parameters()] == trained
    assert torch.equal(model(**batch("llama")).logits, before)


def test_a_refused_second_adapter_leaves_the_first_working() -> None:
    model = get_peft_model(base_model("llama"), config("llama")).eval()
    before = model(**batch("llama")).logits
    with pytest.raises(ProjectionError, match="d must lie in"):
        model.add_adapter("other", config("llama", d=10**6))
    assert torch.equal(model(**batch("llama")).logits, before)
    assert list(model.peft_config) == ["default"]


def test_weighted_sums_are_refused() -> None:
    model = get_peft_model(base_model("llama"), config("llama"))
    with pytest.raises(AdapterError, match="bilinear"):
        model.add_weighted_adapter(["default"], [0.5], "sum")
