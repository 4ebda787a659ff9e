"""theta_D is current in every call, wherever it enters the model, whoever changed theta_d, in whichever thread.

What a call must give is what a deep copy gives, which has made no theta_D yet.
"""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from functools import partial

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from transformers import CLIPConfig, CLIPModel, T5Config, T5ForConditionalGeneration

from tests.threads import in_threads
from tests.tuner.models import base_model, batch, config
from uniproj import get
from uniproj.bank import mixed
from uniproj.tuner import UniProjConfig, adapter_of

IDS = batch("llama")["input_ids"]


class _ThroughData(torch.optim.Optimizer):
    """Writes a new tensor into `.data`, which leaves the version counter as it was."""

    def __init__(self, parameters, lr: float):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = p.data - group["lr"] * p.grad.sign()


def _llama(projection: str = "unilora", d: int | None = 60) -> PeftModel:
    return get_peft_model(base_model("llama"), config("llama", projection, d))


def _clip() -> PeftModel:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text, vision = {**small, "vocab_size": 64, "eos_token_id": 63}, {**small, "image_size": 8, "patch_size": 4}
    base = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    return get_peft_model(base, UniProjConfig(d=60, r=4, target_modules=["q_proj", "v_proj"]))


def _t5() -> PeftModel:
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )
    return get_peft_model(base.eval(), UniProjConfig(d=60, r=4, target_modules=["q", "v"]))


def _text_features(model: PeftModel) -> Tensor:
    features = model.get_text_features(input_ids=IDS)
    return features if isinstance(features, Tensor) else features.pooler_output


def _layer_alone(model: PeftModel) -> Tensor:
    x = torch.linspace(-1, 1, 64).view(2, 32)
    return model.base_model.model.model.layers[1].self_attn.q_proj(x)


# calls that never pass the whole model
PARTS: dict[str, tuple[Callable[[], PeftModel], Callable[[PeftModel], Tensor]]] = {
    "backbone": (_llama, lambda m: m.base_model.model.model(IDS).last_hidden_state),
    "one block": (_llama, lambda m: m.base_model.model.model.layers[0].mlp(torch.ones(2, 32))),
    "one layer": (_llama, _layer_alone),
    "forward itself": (_llama, lambda m: m.base_model.model.forward(IDS).logits),
    "text features": (_clip, _text_features),
    "encoder": (_t5, lambda m: m.base_model.model.encoder(IDS).last_hidden_state),
}


OPTIMISERS = [torch.optim.AdamW, bitsandbytes.optim.AdamW8bit, _ThroughData]


@pytest.fixture(params=PARTS)
def part(request) -> tuple[PeftModel, Callable[[PeftModel], Tensor]]:
    made, call = PARTS[request.param]
    return made(), call


@torch.no_grad()
def _fresh(model: PeftModel, call: Callable[[PeftModel], Tensor]) -> Tensor:
    return call(copy.deepcopy(model))


@pytest.mark.parametrize(("name", "kind"), zip(PARTS, 2 * OPTIMISERS, strict=True))
def test_a_part_trains(name: str, kind: type[torch.optim.Optimizer]) -> None:
    made, call = PARTS[name]
    model = made()
    target = _fresh(model, call) + 0.1
    optimiser = kind([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(4):
        loss = (call(model) - target).square().mean()
        assert loss.item() == pytest.approx((_fresh(model, call) - target).square().mean().item(), rel=1e-6)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@torch.no_grad()
def test_a_part_sees_what_was_written_past_the_version_counter(part) -> None:
    model, call = part
    theta_d = adapter_of(model).theta_d
    before = call(model)
    theta_d.data.copy_(4 * theta_d)
    after = call(model)
    assert not torch.equal(after, before)
    assert torch.equal(after, _fresh(model, call))


def test_generate_encodes_with_the_adapter_as_it_is() -> None:
    model = _t5()
    sampling = {"max_new_tokens": 3, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    before = model.generate(input_ids=IDS, **sampling).scores[0]
    theta_d = adapter_of(model).theta_d
    theta_d.data.copy_(8 * theta_d)
    after = model.generate(input_ids=IDS, **sampling).scores[0]
    assert not torch.equal(after, before)
    assert torch.equal(after, copy.deepcopy(model).generate(input_ids=IDS, **sampling).scores[0])


@pytest.mark.parametrize("projection", ["unilora", "vblora", "tied_lora", "vera", "lora_xs"])
def test_two_backwards_before_a_step(projection: str) -> None:
    model = _llama(projection, 60 if projection == "unilora" else None)
    expected = {}
    for scale in (1.0, 2.0):
        twin = copy.deepcopy(model)
        (scale * twin.base_model.model.model(IDS).last_hidden_state).square().sum().backward()
        for name, p in twin.named_parameters():
            if p.grad is not None:
                expected[name] = expected.get(name, 0) + p.grad
    for scale in (1.0, 2.0):
        (scale * model.base_model.model.model(IDS).last_hidden_state).square().sum().backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)
    # two forwards, then their backwards one after the other: each has a graph of its own
    model.zero_grad()
    outputs = [(scale * model.base_model.model.model(IDS).last_hidden_state).square().sum() for scale in (1.0, 2.0)]
    for output in outputs:
        output.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


def test_moving_averages_swap_in_and_out(part) -> None:
    model, call = part
    theta_d = adapter_of(model).theta_d
    averaged = AveragedModel(model, avg_fn=lambda average, new, n: 0.5 * (average + new))
    averaged.update_parameters(model)
    with torch.no_grad():
        theta_d.mul_(3)
    averaged.update_parameters(model)
    kept = theta_d.detach().clone()
    mean = dict(averaged.module.named_parameters())["base_model.uniproj_theta_d.default"]
    torch.testing.assert_close(mean, kept * (1 + 1 / 3) / 2)
    with torch.no_grad():
        expected = call(model)
        theta_d.data.copy_(mean)
        assert torch.equal(call(model), _fresh(averaged.module, call))
        theta_d.data.copy_(kept)
        assert torch.equal(call(model), expected)


@pytest.mark.parametrize("projection", ["unilora", "lora_xs", "fastfood", "vblora", "tied_lora"])
def test_functional_call_uses_the_numbers_it_is_given(projection: str) -> None:
    model = _llama(projection, 60 if get(projection).free_d else None)
    name = "base_model.uniproj_theta_d.default"
    theta_d, inputs = model.get_parameter(name), {**batch("llama"), "use_cache": False}

    def loss(theta: Tensor) -> Tensor:
        return functional_call(model, {name: theta}, (), inputs).loss

    twin = copy.deepcopy(model)
    twin(**batch("llama")).loss.backward()
    gradient = twin.get_parameter(name).grad
    (by_backward,) = torch.autograd.grad(loss(theta_d), theta_d)
    torch.testing.assert_close(by_backward, gradient)
    torch.testing.assert_close(torch.func.grad(loss)(theta_d.detach()), gradient)
    several = torch.stack([theta_d.detach(), 2 * theta_d.detach(), -theta_d.detach()])
    with torch.no_grad():
        together, one_by_one = torch.func.vmap(loss)(several), torch.stack([loss(theta) for theta in several])
        torch.testing.assert_close(together, one_by_one)
        assert torch.equal(loss(theta_d), model(**batch("llama")).loss)  # nothing of the transforms is left behind


def _interrupted(model, layer: int, call) -> None:
    """A call that Ctrl-C ends before this layer."""

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.base_model.model.model.layers[layer].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        call(model)
    hook.remove()


@pytest.mark.parametrize("call", [lambda m: m(IDS).logits, PARTS["backbone"][1]], ids=["whole", "backbone"])
@torch.no_grad()
def test_an_interrupted_call_ends_with_the_next(call) -> None:
    model = _llama()
    _interrupted(model, 0, call)
    adapter_of(model).theta_d.data.mul_(3)
    assert torch.equal(call(model), _fresh(model, call))


@torch.no_grad()
def test_an_interrupted_call_leaves_nothing_to_a_new_adapter_of_its_name() -> None:
    model = _llama()
    _interrupted(model, 1, lambda m: m(IDS))
    model.delete_adapter("default")
    model.add_adapter("default", config("llama", "fastfood", 60))
    model.set_adapter("default")
    call = PARTS["backbone"][1]
    assert torch.equal(call(model), _fresh(model, call))


def test_torch_func_projects_once_per_call_also_after_a_step() -> None:
    model = _llama()
    name = "base_model.uniproj_theta_d.default"
    optimiser = torch.optim.SGD([model.get_parameter(name)], lr=0.1)
    model(**batch("llama")).loss.backward()
    optimiser.step()
    projected = []
    adapter_of(model).P.register_forward_hook(lambda *_: projected.append(1))
    inputs = {**batch("llama"), "use_cache": False}
    theta_d = model.get_parameter(name).detach()
    torch.func.grad(lambda theta: functional_call(model, {name: theta}, (), inputs).loss)(theta_d)
    assert len(projected) == 1


class _Tuned(nn.Module):
    """A model that takes an optimiser's step within its forward."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.step = inner, lambda: None

    def forward(self, *args, **kwargs):
        self.step()
        return self.inner(*args, **kwargs)


def test_a_step_within_a_call_is_seen_by_its_later_layers() -> None:
    model = _llama()
    theta_d = adapter_of(model).theta_d
    layers = model.base_model.model.model.layers
    tuned = layers[1] = _Tuned(layers[1])
    optimiser = _ThroughData([theta_d], lr=0.5)
    theta_d.grad = torch.ones_like(theta_d)
    tuned.step = optimiser.step
    with torch.no_grad():
        seen = []
        layers[0].register_forward_hook(lambda *_: seen.append(layers[0].self_attn.q_proj.lora_B["default"].weight))
        tuned.inner.register_forward_hook(lambda *_: seen.append(layers[0].self_attn.q_proj.lora_B["default"].weight))
        model(IDS)
    torch.testing.assert_close((seen[0] - seen[1]).abs().amax(), 0.5 / _occurrences(model) ** 0.5)


def _occurrences(model: PeftModel) -> Tensor:
    """The smallest count of a column among those that q_proj's B of the first layer uses."""
    P = adapter_of(model).P
    rows = P.layout.block("model.layers.0.self_attn.q_proj", "B").rows
    M = P.to_dense() != 0
    return M.sum(0)[M[rows].any(0)].min().float()


# ---- threads ------------------------------------------------------------------------------------------


def test_threads_of_several_dtypes_do_not_mix_their_factors() -> None:
    model = _llama().eval()

    def logits(autocast: bool) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(IDS).logits

    expected = {autocast: logits(autocast) for autocast in (False, True)}

    def work(autocast: bool) -> Callable[[], None]:
        def run() -> None:
            for _ in range(10):
                assert torch.equal(logits(autocast), expected[autocast])

        return run

    in_threads(work(False), work(True), work(False), work(True))


@pytest.mark.parametrize("projection", ["unilora", "vblora"])
def test_evaluating_in_one_thread_leaves_training_in_another_alone(projection: str) -> None:
    model = _llama(projection, 60 if projection == "unilora" else None).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(**batch("llama")).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    logits = copy.deepcopy(model)(IDS).logits.detach()
    done = threading.Event()

    def train() -> None:
        try:
            for _ in range(8):
                model.zero_grad()
                model(**batch("llama")).loss.backward()
                for name, gradient in expected.items():
                    torch.testing.assert_close(model.get_parameter(name).grad, gradient)
        finally:
            done.set()

    def evaluate() -> None:
        while not done.is_set():
            with torch.no_grad():
                torch.testing.assert_close(model(IDS, use_cache=False).logits, logits)

    in_threads(train, evaluate)


def test_a_backward_in_another_thread_uses_the_theta_D_of_its_forward() -> None:
    """As on a GPU, whose backward runs in a thread of its own."""
    model = _llama().train()
    model(**batch("llama")).loss.backward()
    P, theta_d = adapter_of(model)
    expected, theta_d.grad = theta_d.grad, None
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    projected = []
    P.register_forward_hook(lambda *_: projected.append(1))
    in_threads(model(**batch("llama")).loss.backward)
    torch.testing.assert_close(theta_d.grad, expected)
    assert len(projected) == 1


@torch.no_grad()
def test_threads_mix_batches_of_their_own() -> None:
    model = _llama().eval()
    thetas = torch.linspace(-0.3, 0.3, 5 * 60).view(5, 60)

    def logits(rows: list[int]) -> Tensor:
        with torch.no_grad(), mixed(model, thetas, rows):
            return model(IDS).logits

    def work(rows: list[int]) -> Callable[[], None]:
        expected = logits(rows)

        def run() -> None:
            for _ in range(8):
                assert torch.equal(logits(rows), expected)

        return run

    in_threads(work([0, 1, 2]), work([3, 4, 0]), work([2, 2, 2]))


def test_what_a_forward_leaves_goes_with_its_thread_and_its_model() -> None:
    model = _llama()
    source = model.base_model._sources["default"]
    in_threads(partial(model, IDS))  # with a graph, and never walked back
    gc.collect()
    assert not any(ref() for ref in source._live)
    model(IDS)
    gone = weakref.ref(source)
    del source, model
    gc.collect()
    assert gone() is None


def test_training_holds_no_theta_D_of_an_evaluation_before_it() -> None:
    model = _llama()
    with torch.no_grad():
        model(IDS)
        factor = weakref.ref(next(m for m in model.modules() if hasattr(m, "lora_A")).lora_A["default"].weight)
    assert factor() is not None
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert factor() is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_around_the_whole_model(use_reentrant: bool) -> None:
    model = _llama("vblora", None)
    model(**batch("llama")).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return model(inputs_embeds=x, labels=batch("llama")["labels"], use_cache=False).loss

    checkpoint(loss, embedded, use_reentrant=use_reentrant).backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_between_adapted_layers_that_are_in_none(use_reentrant: bool) -> None:
    model = get_peft_model(base_model("llama"), config("llama", target_modules=["q_proj", "lm_head"])).train()
    theta_d = adapter_of(model).theta_d
    model(**batch("llama")).loss.backward()
    expected, theta_d.grad = theta_d.grad, None
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model(**batch("llama")).loss.backward()
    torch.testing.assert_close(theta_d.grad, expected)


def test_a_first_use_by_many_threads_at_once() -> None:
    for projection in ("unilora", "unilora_local", "fastfood", "vera"):
        model = _llama(projection, None if projection == "vera" else 60).eval()
        expected = _fresh(model, lambda m: m(IDS).logits)
        start = threading.Barrier(4)

        def work(model=model, expected=expected, start=start) -> None:
            start.wait()
            with torch.no_grad():
                assert torch.equal(model(IDS).logits, expected)

        in_threads(*[work] * 4)


# ---- inference mode -----------------------------------------------------------------------------------


def test_everything_works_under_inference_mode(tmp_path) -> None:
    model = _llama().eval()
    with torch.no_grad():
        adapter_of(model).theta_d.mul_(2)
    model.save_pretrained(tmp_path)
    sampling = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        expected, tokens = model(IDS).logits, model.generate(input_ids=IDS, **sampling)
        other = copy.deepcopy(model)
        merged = other.merge_and_unload()(IDS).logits
    with torch.inference_mode():
        model = PeftModel.from_pretrained(base_model("llama"), tmp_path)
        model.load_adapter(tmp_path, "again")
        for name in ("again", "default"):
            model.set_adapter(name)
            assert torch.equal(model(IDS).logits, expected)
        assert torch.equal(model.generate(input_ids=IDS, **sampling), tokens)
        model.merge_adapter()
        assert torch.equal(model(IDS).logits, merged)
        model.unmerge_adapter()
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(model.merge_and_unload()(IDS).logits, merged, rtol=1e-4, atol=1e-4)


# ---- torch.compile ------------------------------------------------------------------------------------


def test_compiled_whole_and_in_part_after_eager_calls() -> None:
    model = get_peft_model(base_model("llama", num_hidden_layers=1), config("llama"))
    theta_d = adapter_of(model).theta_d
    with torch.no_grad():
        model(IDS)
    torch._dynamo.reset()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    backbone = torch.compile(model.base_model.model.model, backend="eager", fullgraph=True)
    for _ in range(2):
        with torch.no_grad():
            theta_d.mul_(2)
            assert torch.equal(whole(IDS).logits, _fresh(model, lambda m: m(IDS).logits))
        model.zero_grad()
        backbone(IDS).last_hidden_state.square().sum().backward()
        twin = copy.deepcopy(model)
        twin.zero_grad()
        twin.base_model.model.model(IDS).last_hidden_state.square().sum().backward()
        torch.testing.assert_close(theta_d.grad, adapter_of(twin).theta_d.grad)
    torch._dynamo.reset()


def test_blocks_compiled_one_by_one_train_and_do_not_compile_again() -> None:
    model = _llama()
    theta_d = adapter_of(model).theta_d
    torch._dynamo.reset()
    compiled = torch._dynamo.testing.CompileCounter()
    for block in model.base_model.model.model.layers:
        block.compile(backend=compiled, fullgraph=True)
    counts = []
    for _ in range(3):
        model.zero_grad()
        loss = model(**batch("llama")).loss
        loss.backward()
        with torch.no_grad():
            theta_d.sub_(0.1 * theta_d.grad)
        counts.append(compiled.frame_count)
    assert counts[0] == counts[-1]
    torch._dynamo.reset()


def test_lora_of_peft_gives_the_same_training() -> None:
    """The projection `lora` is PEFT's LoRA: equal steps through a part of the model."""
    ours = _llama("lora", None)
    theirs = get_peft_model(
        base_model("llama"), LoraConfig(r=4, lora_alpha=4, target_modules=config("llama").target_modules)
    )
    P, theta_d = adapter_of(ours)
    factors = P.layout.split(P(theta_d).detach())
    with torch.no_grad():
        for block, factor in zip(P.layout.blocks, factors, strict=True):
            layer = theirs.base_model.model.get_submodule(block.module)
            (layer.lora_B if block.factor == "B" else layer.lora_A)["default"].weight.copy_(factor)
    for model in (ours, theirs):
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(3):
            model.base_model.model.model(IDS).last_hidden_state.square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)
