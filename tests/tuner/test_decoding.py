"""Decoding: theta_D is projected and compared once per `generate`, whoever calls it, and every edit is seen in time.

What a generation must give is what a deep copy gives, which has made no theta_D yet.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GenerationMixin, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.generation.configuration_utils import CompileConfig

from tests.threads import in_threads
from tests.tuner.models import base_model, batch, config
from uniproj import AdapterError
from uniproj.bank import mixed
from uniproj.tuner import UniProjConfig, adapter_of, theta

IDS = batch("llama")["input_ids"]
TOKENS = 5
GREEDY = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}


def _llama(projection: str = "unilora", layers: int = 2, **fields: Any) -> PeftModel:
    d = 60 if projection == "unilora" else None
    base = base_model("llama", num_hidden_layers=layers)
    model = get_peft_model(base, config("llama", projection, d, **fields)).eval()
    with torch.no_grad():
        for parameter in adapter_of(model).P.parameters():
            parameter.mul_(3)
        adapter_of(model).theta_d.mul_(40)
    return model


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The result of each comparison by value."""
    found: list[bool] = []
    equal = theta._equal

    def recorded(*tensors: Any) -> bool:
        found.append(equal(*tensors))
        return found[-1]

    monkeypatch.setattr(theta, "_equal", recorded)
    return found


def _projected(model: PeftModel) -> list[bool]:
    """One entry for each projection from now on: whether it was made within compiled code."""
    found: list[bool] = []
    adapter_of(model).P.register_forward_hook(lambda *_: found.append(torch.compiler.is_compiling()))
    return found


# ---- every way to generate ----------------------------------------------------------------------------


class _Words:
    """As much of a tokenizer as a streamer needs."""

    def decode(self, tokens: Any, **_: Any) -> str:
        return "".join(f"{int(token)} " for token in tokens)


def _streamed(model: PeftModel) -> Tensor:
    streamer = TextIteratorStreamer(_Words())
    thread = threading.Thread(target=model.generate, kwargs={**GREEDY, "input_ids": IDS[:1], "streamer": streamer})
    thread.start()
    tokens = [int(word) for text in streamer for word in text.split()]
    thread.join()
    return torch.tensor(tokens)


def _by_trl(model: PeftModel) -> Tensor:
    trl = pytest.importorskip("trl.models.utils")
    with torch.no_grad(), trl.unwrap_model_for_generation(model, Accelerator(cpu=True)) as unwrapped:
        return _tokens(unwrapped)


def _tokens(model: nn.Module, **options: Any) -> Tensor:
    return model.generate(**{"input_ids": IDS, **GREEDY, **options})


def _assisted(model: nn.Module, assistant: nn.Module) -> Tensor:
    # without min_new_tokens, with which Transformers 5.0 assists nobody
    return _tokens(model, input_ids=IDS[:1], assistant_model=assistant, min_new_tokens=None)


WAYS: dict[str, Callable[[PeftModel], Tensor]] = {
    "dynamic cache": _tokens,
    "static cache": partial(_tokens, cache_implementation="static"),
    "no cache": partial(_tokens, use_cache=False),
    "beams": partial(_tokens, num_beams=3),
    "prompt lookup": partial(_tokens, input_ids=IDS[:1], prompt_lookup_num_tokens=2),
    "assisted": partial(_assisted, assistant=base_model("llama", num_hidden_layers=1)),
    "its own assistant": lambda model: _assisted(model, model),
    "streaming": _streamed,
    "the tuner's": lambda model: _tokens(model.base_model),
    "the base model's": lambda model: _tokens(model.get_base_model()),
    "under inference_mode": torch.inference_mode()(_tokens),
    "TRL": _by_trl,
}


@pytest.mark.parametrize(("way", "projection"), zip(WAYS, cycle(["unilora", "vblora"]), strict=False))
def test_one_comparison_and_one_projection_per_generation(way: str, projection: str, compared: list[bool]) -> None:
    model, generate = _llama(projection, task_type=None if way == "beams" else "CAUSAL_LM"), WAYS[way]
    projected = _projected(model)
    expected = generate(copy.deepcopy(model))
    compared.clear()
    projected.clear()
    assert torch.equal(generate(model), expected)
    assert (len(projected), compared) == (1, [])
    assert torch.equal(generate(model), expected)
    assert (len(projected), compared) == (1, [True])
    adapter_of(model).theta_d.data.neg_().mul_(3)
    fresh = generate(copy.deepcopy(model))
    assert not torch.equal(fresh, expected)
    projected.clear()
    compared.clear()
    assert torch.equal(generate(model), fresh)
    assert (len(projected), compared) == (1, [False])


@torch.no_grad()
def test_a_loop_of_ones_own_compares_at_each_token(compared: list[bool]) -> None:
    model = _llama()
    projected, cache, ids = _projected(model), None, IDS
    for _ in range(TOKENS):
        output = model(ids, past_key_values=cache, use_cache=True)
        cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
    assert (len(projected), compared) == (1, (TOKENS - 1) * [True])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_the_least_edit_of_one_number_is_seen(dtype: torch.dtype) -> None:
    model = _llama().to(dtype)
    theta_d = adapter_of(model).theta_d
    model(IDS)
    projected = _projected(model)
    theta_d.data[-1].view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]).bitwise_xor_(1)
    model(IDS)
    model(IDS)
    assert len(projected) == 1


# ---- edits within a generation ------------------------------------------------------------------------

LAYER = "model.layers.0.self_attn.q_proj"


class _Callback(StoppingCriteria):
    """Runs `work` after the second token, and notes what a layer of the model adds to its base at each token."""

    def __init__(self, model: PeftModel, work: Callable[[], Any]):
        self._work = work
        self._added: list[tuple[Tensor, Tensor]] = []
        layer = model.get_base_model().get_submodule(LAYER)

        def note(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            x = inputs[0][:, -1]
            self._added.append((x, output[:, -1] - layer.base_layer(x)))

        layer.register_forward_hook(note)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if input_ids.shape[1] == IDS.shape[1] + 2:
            self._work()
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def check(self, expected: list[Tensor]) -> None:
        """expected: B A at each token."""
        for (x, added), BA in zip(self._added, expected, strict=True):
            torch.testing.assert_close(added, x @ BA.T, rtol=1e-3, atol=1e-3)
        self._added.clear()


@torch.no_grad()
def _BA(model: PeftModel, name: str = "default") -> Tensor:
    """The update of the layer, as P and theta_d say."""
    P, theta_d = adapter_of(model, name)
    theta_D = (P.to_dense() @ theta_d.double()).float()
    A, B = (theta_D[P.layout.block(LAYER, factor).rows].view(P.layout.block(LAYER, factor).shape) for factor in "AB")
    return B @ A


def _step(theta_d: nn.Parameter, fused: bool = False) -> None:
    theta_d.grad = torch.ones_like(theta_d)
    torch.optim.SGD([theta_d], lr=0.5, fused=fused).step()
    theta_d.grad = None


def _replace(theta_d: nn.Parameter) -> None:
    theta_d.data = 2 * theta_d.data


EDITS: dict[str, Callable[[nn.Parameter], Any]] = {
    "in place": lambda theta_d: theta_d.mul_(2),
    "another tensor as data": _replace,
    "an optimiser's step": _step,
    "a step that PyTorch counts no write of": partial(_step, fused=True),
    "through data": lambda theta_d: theta_d.data.mul_(2),
}


@pytest.mark.parametrize("edit", EDITS)
@torch.no_grad()
def test_an_edit_in_a_callback(edit: str) -> None:
    """Seen by the next token, but for one through `.data`, which no counter tells: by the next generation."""
    model = _llama()
    before = _BA(model)
    callback = _Callback(model, lambda: EDITS[edit](adapter_of(model).theta_d))
    _tokens(model, stopping_criteria=StoppingCriteriaList([callback]))
    after = _BA(model)
    assert not torch.allclose(before, after, rtol=1e-2)
    callback.check([before] * 2 + [before if edit == "through data" else after] * (TOKENS - 2))
    _tokens(model)
    callback.check([after] * TOKENS)


def test_numbers_that_lie_where_the_old_ones_did() -> None:
    """Were their memory not held, a third tensor could be taken for the first."""
    theta_d = nn.Parameter(torch.ones(1000))
    unwritten = theta._Unwritten([theta_d])
    assert unwritten.holds([theta_d]) and not unwritten.holds([theta_d, theta_d])
    for _ in range(10):
        theta_d.data = torch.zeros(1000)
        assert not unwritten.holds([theta_d])
    with torch.inference_mode():
        uncounted = [torch.ones(3)]
        assert not theta._Unwritten(uncounted).holds(uncounted)


@pytest.mark.parametrize("work", ["switch", "disable", "generate within", "delete and add"])
@torch.no_grad()
def test_adapters_change_between_tokens(work: str) -> None:
    model = _llama()
    other = UniProjConfig(projection="fastfood", d=60, r=4, target_modules=["q_proj", "v_proj"])
    model.add_adapter("other", other)
    adapter_of(model, "other").theta_d.mul_(30)

    def within() -> None:
        adapter_of(model).theta_d.mul_(2)
        _tokens(model, max_new_tokens=1, min_new_tokens=1)

    def anew() -> None:
        model.delete_adapter("default")
        model.add_adapter("default", copy.copy(other))
        adapter_of(model).theta_d.mul_(40)
        model.set_adapter("default")

    works = {
        "switch": lambda: model.set_adapter("other"),
        "disable": model.base_model.disable_adapter_layers,
        "generate within": within,
        "delete and add": anew,
    }
    callback, before = _Callback(model, works[work]), _BA(model)
    _tokens(model, stopping_criteria=StoppingCriteriaList([callback]))
    after = 0 * before if work == "disable" else _BA(model, model.active_adapter)
    assert not torch.allclose(before, after, rtol=1e-2)
    callback.check([before] * 2 + [after] * (TOKENS - 2 + (work == "generate within")))


@torch.no_grad()
def test_a_generation_of_the_bare_base_between_two(compared: list[bool]) -> None:
    model = _llama()
    projected = _projected(model)
    whole = _tokens(model)
    with model.disable_adapter():
        bare = _tokens(model)
    assert torch.equal(bare, _tokens(base_model("llama"))) and not torch.equal(bare, whole)
    assert torch.equal(_tokens(model), whole)
    assert (len(projected), compared) == (1, [True])


# ---- mixed batches and threads ------------------------------------------------------------------------

THETAS = torch.linspace(-0.5, 0.5, 5 * 60).view(5, 60)


@torch.no_grad()
def test_a_mixed_batch_projects_once_per_generation(compared: list[bool]) -> None:
    model, thetas, users = _llama(), THETAS.clone(), [4, 0, 2]
    projected = _projected(model)
    for _ in range(2):  # and again after an edit
        with mixed(model, thetas, users):
            found = _tokens(model)
        twin = copy.deepcopy(model)
        for row, user in enumerate(users):
            with mixed(twin, thetas, [user]):
                assert torch.equal(found[row], _tokens(twin, input_ids=IDS[row : row + 1])[0])
        thetas.data.mul_(-1)
    projected.clear()
    compared.clear()
    with mixed(model, thetas, users):
        _tokens(model)
        _tokens(model)
    assert (len(projected), compared) == (1, [False, True])


@torch.no_grad()
def test_another_block_of_mixed_within_a_generation_takes_its_own_rows() -> None:
    """An array of numbers is taken as it lies, and PyTorch counts nothing that is written to it."""
    model, rows = _llama(layers=1), np.array([0, 1, 2])
    part = model.get_base_model().model.layers[0].mlp
    x = torch.randn(3, 2, 32)
    with model.base_model._call.generation():
        for _ in range(2):
            with mixed(model, THETAS, rows):
                found = part(x)
            twin = copy.deepcopy(model)
            with mixed(twin, THETAS, rows.copy()):
                assert torch.equal(found, twin.get_base_model().model.layers[0].mlp(x))
            rows += 2


def test_threads_generate_with_what_is_theirs() -> None:
    model = _llama()

    def tokens(rows: list[int] | None, autocast: bool) -> Tensor:
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            nullcontext() if rows is None else mixed(model, THETAS, rows),
        ):
            return _tokens(model)

    cases = [(None, False), (None, True), ([0, 1, 2], False), ([4, 3, 0], False)]
    expected = [tokens(*case) for case in cases]

    def work(k: int) -> None:
        for _ in range(4):
            assert torch.equal(tokens(*cases[k]), expected[k])

    in_threads(*(partial(work, k) for k in range(len(cases))))


# ---- compiled -----------------------------------------------------------------------------------------


_compiled: list[Any] = []


def _compile(graph: Any, _: Any) -> Any:
    _compiled.append(graph)
    return graph


@pytest.fixture
def compiling() -> Iterator[dict[str, Any]]:
    """Arguments of `generate` for a static cache and compiled decoding, as on a GPU."""
    torch._dynamo.reset()
    compiler = CompileConfig(fullgraph=True, backend=_compile, mode=None)
    compiler._compile_all_devices = True
    yield {"cache_implementation": "static", "compile_config": compiler}
    _compiled.clear()
    torch._dynamo.reset()


@torch.no_grad()
def test_compiled_decoding_takes_the_theta_D_of_its_generation(compiling: dict[str, Any]) -> None:
    model = _llama(layers=1)
    model.add_adapter("other", config("llama", "vera", None))
    projected, counts = _projected(model), []
    for scale in (1, -2, 1):
        adapter_of(model).theta_d.data.mul_(scale)
        expected = _tokens(copy.deepcopy(model), cache_implementation="static")
        projected.clear()
        assert torch.equal(_tokens(model, **compiling), expected)
        assert projected == [False] * (scale != 1 or not counts)
        counts.append(len(_compiled))
    assert counts[0] > 0 and len(set(counts)) == 1  # an edit compiles nothing again
    for change in (lambda: model.set_adapter("other"), model.base_model.disable_adapter_layers):
        change()
        expected = _tokens(copy.deepcopy(model), cache_implementation="static")
        assert torch.equal(_tokens(model, **compiling), expected)


@torch.no_grad()
def test_a_mixed_batch_decoded_by_compiled_code(compiling: dict[str, Any]) -> None:
    model = _llama(layers=1)
    for rows in ([0, 1, 2], [4, 3, 3]):
        with mixed(model, THETAS, rows):
            expected = _tokens(model, cache_implementation="static")
            projected = _projected(model)
            assert torch.equal(_tokens(model, **compiling), expected)
            assert not any(projected)


@torch.no_grad()
def test_code_compiled_in_a_generation_projects_outside_of_one(compiling: dict[str, Any]) -> None:
    model = _llama(layers=1)
    _tokens(model, **compiling)
    compiled = torch.compile(model.get_base_model().__call__, backend="eager", fullgraph=True)
    for scale in (1, 2):
        adapter_of(model).theta_d.data.mul_(scale)
        torch.testing.assert_close(compiled(IDS).logits, copy.deepcopy(model)(IDS).logits)


@pytest.mark.usefixtures("compiling")
def test_autocast_and_gradients_may_change_within_a_generation() -> None:
    """As in a callback that evaluates or trains."""
    model = _llama(layers=1)
    theta_d = adapter_of(model).theta_d
    compiled = torch.compile(model.get_base_model().__call__, backend="eager")
    with model.base_model._call.generation():
        for call in (model, compiled):
            with torch.no_grad():
                with torch.autocast("cpu", torch.bfloat16):
                    model(IDS)
                torch.testing.assert_close(call(IDS).logits, copy.deepcopy(model)(IDS).logits)
                model(IDS)
            call(IDS).logits.square().mean().backward()
            assert theta_d.grad is not None and theta_d.grad.any()
            theta_d.grad = None


# ---- a GPU --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_off_the_CPU_nothing_is_compared(compared: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's meta device stands in: whatever needs a number of a tensor is an error there."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # which knows no meta device
    for projection in ("lora", "vblora"):
        model, x = _llama(projection).to("meta"), torch.ones(1, 2, 32, device="meta")
        layer, projected = model.get_base_model().model.layers[0], _projected(model)
        part = partial(layer, position_embeddings=2 * (torch.ones(1, 2, layer.self_attn.head_dim, device="meta"),))
        for _ in range(3):
            part(x)
        assert len(projected) == 3  # an edit through `.data` is seen, at the cost of a product
        with model.base_model._call.generation():
            for _ in range(3):
                part(x)
            adapter_of(model).theta_d.mul_(2)
            for _ in range(3):
                part(x)
        assert len(projected) == 5 and not compared
        assert model.base_model._sources["default"]._kept is None


@torch.no_grad()
def test_a_call_on_fake_tensors_leaves_nothing_to_the_next() -> None:
    model = _llama()
    expected = copy.deepcopy(model)(IDS).logits
    for _ in range(2):
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.get_base_model().model.layers[0].mlp(torch.randn(2, 32))
        assert torch.equal(model(IDS).logits, expected)


# ---- the attribute that begins a generation -----------------------------------------------------------


def test_generate_belongs_to_its_own_model() -> None:
    base = base_model("llama")
    assert "generate" not in vars(base)
    model = get_peft_model(base, config("llama")).eval()
    twin = copy.deepcopy(model)
    for other in (twin, pickle.loads(pickle.dumps(model))):
        assert other.get_base_model().generate.__self__ is other.base_model
    assert "generate" not in vars(model.unload())
    with pytest.raises(AdapterError):
        get_peft_model(base, config("llama", target_modules=["q_proj", "nowhere"]))
    assert "generate" not in vars(base)
    base.generate = lambda: "somebody else's"
    wrapped = get_peft_model(base, config("llama"))
    assert wrapped.unload().generate() == "somebody else's"
    bert = get_peft_model(base_model("bert"), config("bert"))
    assert not isinstance(bert.get_base_model(), GenerationMixin) and not hasattr(bert.base_model, "generate")


def test_a_generation_that_fails_ends() -> None:
    model = _llama()

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _tokens(model, stopping_criteria=StoppingCriteriaList([_Callback(model, interrupt)]))
    with torch.no_grad():
        adapter_of(model).theta_d.data.mul_(2)
        assert torch.equal(model(IDS).logits, copy.deepcopy(model)(IDS).logits)
