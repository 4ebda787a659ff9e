"""Modules that read an adapted layer's weight: PyTorch's own call the layer instead, all others are refused."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import T5Config, T5ForConditionalGeneration

from tests.tuner.models import base_model, batch, config, logits
from uniproj import AdapterError
from uniproj.exchange import export
from uniproj.tuner import UniProjConfig, adapter_of, bypass
from uniproj.tuner.bypass import _Reads


@pytest.fixture(autouse=True)
def _nothing_is_left_watching():
    yield
    assert _get_current_dispatch_mode() is None


def _attached(base: nn.Module, *targets: str) -> PeftModel:
    model = get_peft_model(base, UniProjConfig(d=20, r=2, target_modules=list(targets)))
    adapter_of(model).theta_d.data.mul_(30)
    return model


# ---- PyTorch's encoders ---------------------------------------------------------------------------

PADDING = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]]).bool()


def _encoder(**options) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 3)


def _by_hand(model: PeftModel, x: Tensor, padding: Tensor | None) -> Tensor:
    """The encoder with W + s B A in place of W, by formulas of its own."""
    encoder = model.get_base_model()
    hidden = x
    for layer in encoder.layers:
        q, k, v = F.linear(hidden, layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias).chunk(3, -1)
        heads = [t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v)]
        mask = None if padding is None else ~padding[:, None, None, :]
        attended = F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(-2)
        hidden = layer.norm1(hidden + layer.self_attn.out_proj(attended))
        inner = hidden
        for linear, after in ((layer.linear1, torch.relu), (layer.linear2, lambda t: t)):
            base = getattr(linear, "base_layer", linear)
            weight = base.weight if base is linear else base.weight + linear.get_delta_weight("default")
            inner = after(F.linear(inner, weight, base.bias))
        hidden = layer.norm2(hidden + inner)
    return hidden


@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["layers.0.linear1"], ["layers.2.linear2"]])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@torch.no_grad()
def test_an_encoder_computes_with_its_adapters_in_evaluation(targets, padding, context: Callable) -> None:
    model = _attached(_encoder(), *targets).eval()
    x, tokens = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)), ~(PADDING & (padding is not None))
    with context():
        found = model(x, src_key_padding_mask=padding)
        with model.disable_adapter():
            without = model(x, src_key_padding_mask=padding)
    assert torch.allclose(found[tokens], _by_hand(model, x, padding)[tokens], atol=1e-5)
    assert not torch.allclose(found[tokens], without[tokens], atol=1e-2)
    assert torch.allclose(without[tokens], _encoder().eval()(x, src_key_padding_mask=padding)[tokens], atol=1e-5)


def _switches(encoder: nn.Module) -> list:
    return [encoder.use_nested_tensor, *(layer.activation_relu_or_gelu for layer in encoder.layers)]


@pytest.mark.parametrize("way", ["unload", "merge_and_unload", "delete_adapter", "refused"])
def test_the_fast_paths_come_back(way: str) -> None:
    base = _encoder(activation="gelu")
    before = _switches(base)
    assert before == [True, 2, 2, 2]
    if way == "refused":
        with pytest.raises(AdapterError, match="'nowhere'"):
            _attached(base, "linear1", "nowhere")
    else:
        model = _attached(base, "layers.1.linear1")
        assert _switches(base) == [False, 2, 0, 2]  # a layer without an adapter keeps its own
        getattr(model, way)(*["default"] * (way == "delete_adapter"))
    assert _switches(base) == before


def test_a_second_adapter_elsewhere() -> None:
    model = _attached(_encoder(), "layers.0.linear1")
    model.add_adapter("other", UniProjConfig(d=20, r=2, target_modules=["layers.2.linear1"]))
    encoder = model.get_base_model()
    assert _switches(encoder) == [False, 0, 1, 0]
    model.delete_adapter("other")
    assert _switches(encoder) == [False, 0, 1, 1]


def test_an_encoder_among_other_modules_and_a_decoder() -> None:
    torch.manual_seed(0)
    model = _attached(nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True), "linear1", "linear2")
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        assert torch.allclose(model.train()(x, x), model.eval()(x, x), atol=1e-5)


def test_layers_inside_multihead_attention_are_refused() -> None:
    attention = nn.MultiheadAttention(8, 2)
    attention.out_proj = nn.Linear(8, 8)  # of the plain class: it is the place that counts
    with pytest.raises(AdapterError, match=r"out_proj.*nn.MultiheadAttention, which uses its weight"):
        _attached(nn.ModuleDict({"attention": attention}), "out_proj")


class Attending(nn.Module):
    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("parameter", ["attention.in_proj_weight", "attention.out_proj.weight"])
def test_an_output_projection_is_refused_by_any_name_of_its_attention(parameter: str) -> None:
    """Its weight is read, and not the layer called, though a parameter of the attention is adapted, or its own."""
    base = Attending(nn.MultiheadAttention(8, 2))
    modules = ["out_proj"] if "in_proj" in parameter else []
    config = UniProjConfig(d=20, r=2, target_modules=modules, target_parameters=[parameter])
    with pytest.raises(AdapterError, match=r"attention\.out_proj.*nn.MultiheadAttention, which uses its weight"):
        get_peft_model(base, config)


@pytest.mark.parametrize("kind", [nn.Linear, NonDynamicallyQuantizableLinear])
@torch.no_grad()
def test_an_output_projection_is_what_the_attention_calls_so(kind: type[nn.Linear]) -> None:
    """W + s B A enters once, of whatever class of PyTorch it is."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True, bias=False)
    attention.out_proj = kind(8, 8, bias=False)
    plain = copy.deepcopy(attention).eval()
    model = _attached(Attending(attention), "attention").eval()
    site = model.get_base_model().attention.base_layer.out_proj
    plain.in_proj_weight += model.get_base_model().attention.get_delta_weight("default")
    plain.out_proj.weight += site.get_delta_weight("default")
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(model(x), plain(x, x, x)[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_layer_that_a_model_calls_is_merged_though_it_is_of_the_class_of_output_projections() -> None:
    base = nn.Sequential(NonDynamicallyQuantizableLinear(8, 8), nn.ReLU())
    model, x = _attached(base, "0").eval(), torch.randn(3, 8)
    wanted = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_attention_that_is_named_with_its_output_projection_is_adapted_once() -> None:
    torch.manual_seed(0)
    base, x = Attending(nn.MultiheadAttention(8, 2)), torch.randn(2, 3, 8)
    models = [
        get_peft_model(copy.deepcopy(base), UniProjConfig(d=20, r=2, target_modules=targets))
        for targets in (["attention"], r"attention(\.out_proj)?", ["attention", "out_proj"])
    ]
    assert len({adapter_of(model).P.layout.fingerprint for model in models}) == 1
    assert all(torch.equal(models[0](x), model(x)) for model in models)


# ---- modules of other people ----------------------------------------------------------------------


class Reader(nn.Module):
    """Passes the layer `lin` by where `reads` is given the module and says so."""

    def __init__(self, reads: Callable[[Reader], bool], how: Callable[[Reader, Tensor], Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.other, self.reads, self.how = nn.Linear(6, 6), nn.Linear(6, 6), reads, how

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.how(self, x) if self.reads(self) else self.lin(x))


READS = {
    "linear": lambda self, x: F.linear(x, self.lin.weight, self.lin.bias),
    "matmul": lambda self, x: x @ self.lin.weight.T,
    "einsum": lambda self, x: torch.einsum("bi,oi->bo", x, self.lin.weight),
    "another dtype": lambda self, x: F.linear(x.double(), self.lin.weight.double()).float(),
    "fused with another": lambda self, x: F.linear(x, torch.cat([self.lin.weight, self.other.weight])).split(6, -1)[0],
    "a row": lambda self, x: x * self.lin.weight[0],
    "normed": lambda self, x: F.linear(x, F.normalize(self.lin.weight.detach().clone(), dim=1)),
    "data": lambda self, x: F.linear(x, self.lin.weight.data),
    "sum": lambda self, x: F.linear(x, self.lin.weight + self.other.weight),
    "convolution": lambda self, x: F.conv1d(x[None].mT, self.lin.weight[..., None])[0].mT,
}


@pytest.mark.parametrize("how", READS)
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_a_weight_read_past_its_adapter_is_refused_at_every_forward(how: str, mode: str) -> None:
    model = _attached(nn.Sequential(Reader(lambda self: self.training == (mode == "training"), READS[how])), "lin")
    x = torch.randn(3, 6)
    for training in (True, False, True, False):
        model.train(training)
        refused = training == (mode == "training")
        said = (
            rf"^0\.lin: the model must call this layer.*\(in {mode}\).*Leave the layers of Reader out of target_modules"
        )
        with pytest.raises(AdapterError, match=said) if refused else nullcontext(), torch.set_grad_enabled(training):
            model(x)
    model.train(mode == "training")
    with model.disable_adapter():
        model(x)
    model.merge_adapter()
    model(x)
    model.unmerge_adapter()
    with pytest.raises(AdapterError, match=r"0\.lin"):
        model(x)
    assert not any(module._forward_pre_hooks for module in model.unload().modules())


def test_a_path_of_its_own_without_gradients_or_under_autocast() -> None:
    for reads, context in (
        (lambda self: not torch.is_grad_enabled(), torch.no_grad),
        (lambda self: torch.is_autocast_enabled("cpu"), lambda: torch.autocast("cpu")),
    ):
        model = _attached(Reader(reads, READS["linear"]), "lin")
        model(torch.randn(3, 6))
        with context(), pytest.raises(AdapterError, match="reads its weight past the adapter"):
            model(torch.randn(3, 6))


class Decoder(nn.Module):
    """Passes `lin` by in a decode step, which it tells by the cache, by a flag or by the length."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: object = None, step: bool = False) -> Tensor:
        past = cache is not None or step or x.shape[1] == 1
        return self.other(F.linear(x, self.lin.weight) if past else self.lin(x))


@pytest.mark.parametrize(
    "given",
    [((), {"cache": [1]}), ((None, [1]), {}), ((), {"step": True}), ((None, None, True), {}), "short", "short, named"],
    ids=str,
)
@torch.no_grad()
def test_a_decode_step_that_comes_later(given) -> None:
    model, x = _attached(Decoder(), "lin").eval(), torch.randn(2, 3, 6)
    for _ in range(2):
        model(x, cache=None)
        model(x=x, step=False)
    with pytest.raises(AdapterError, match=r"^lin: the model must call this layer"):
        if given == "short":
            model(x[:, :1])
        elif given == "short, named":
            model(x=x[:, :1])
        else:
            model(x, *given[0], **given[1])
    model(x)


@pytest.mark.filterwarnings("error")
def test_fake_tensors() -> None:
    model = _attached(Reader(lambda self: True, INNOCENT["its forward called"]), "lin", "other")
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.randn(3, 6)).shape == (3, 6)


def test_the_adapter_that_is_active_counts() -> None:
    model = _attached(Reader(lambda self: True, READS["linear"]), "other")
    model(torch.randn(3, 6))
    model.add_adapter("second", UniProjConfig(d=20, r=2, target_modules=["lin"]))
    model(torch.randn(3, 6))
    model.set_adapter("second")
    with pytest.raises(AdapterError, match=r"^lin: "):
        model(torch.randn(3, 6))


INNOCENT = {
    "metadata": lambda self, x: (
        x.to(self.lin.weight.dtype).to(self.lin.weight.device).view(-1, self.lin.weight.shape[1])
    ),
    "like it": lambda self, x: (
        x.to(self.lin.weight) + torch.zeros_like(self.lin.weight)[0] + self.lin.weight.new_ones(6)
    ),
    "its norm, for a log": lambda self, x: (setattr(self, "log", self.lin.weight.norm()), x)[1],
    "called as well": lambda self, x: self.lin(x) + 0.1 * self.lin.weight.norm(),
    "its forward called": lambda self, x: self.lin.forward(x),
    "idle, kept in the graph": lambda self, x: x + 0.0 * sum(p.sum() for p in self.lin.parameters()),
    "a penalty": lambda self, x: x.add(1e-4 * sum(p.pow(2).sum() for p in self.parameters())),
    "far from where it was": lambda self, x: x + (self.lin.weight - torch.eye(6)).pow(2).sum(),
    "all of them in one vector": lambda self, x: x + nn.utils.parameters_to_vector(self.parameters()).norm(),
    "not orthogonal": lambda self, x: x + (self.lin.weight @ self.lin.weight.T).sub(torch.eye(6)).square().mean(),
    "one number of it": lambda self, x: x + 0 * self.lin.weight[0, 0],
    "a ratio, for a log": lambda self, x: (setattr(self, "log", self.lin.weight.norm() / x.norm()), x)[1],
    "shaped like it": lambda self, x: x[:1].expand_as(self.lin.weight)[: len(x)],
    "not at all": lambda self, x: x,
}


@pytest.mark.parametrize("how", INNOCENT)
def test_no_false_alarms(how: str) -> None:
    model = _attached(Reader(lambda self: True, INNOCENT[how]), "lin", "other")
    for training in (True, False):
        model.train(training)(torch.randn(3, 6))
    with torch.inference_mode():  # operators come whole
        model(torch.randn(3, 6))


def test_no_alarm_for_parts_experts_and_ties() -> None:
    # reads wo.dtype
    model = get_peft_model(_t5(), UniProjConfig(d=20, r=2, target_modules=["q", "wo", "v", "lm_head"]))
    ids = torch.ones(2, 3, dtype=torch.long)
    for training in (True, False):
        model.train(training)
        model.base_model.model.encoder(ids)
        model(input_ids=ids, labels=ids)
    model.generate(input_ids=ids, max_new_tokens=3)  # the cross-attention's k and v are called once

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.tied = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 6)
            self.tied.weight = self.experts[2].weight

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.experts[0](x), self.tied.weight)

    _attached(Experts(), "0", "1", "2")(torch.randn(3, 6))


def _t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=True))


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("targets", [["shared"], ["shared", "lm_head"], ["shared", "encoder.embed_tokens"]])
def test_an_embedding_that_only_lends_its_weight_is_told(targets: list[str]) -> None:
    """T5's `shared`, which is never called: its twins of the same weight are."""
    model = _attached(_t5(), *targets).train()
    with pytest.warns(RuntimeWarning, match=r"^shared: .* encoder\.embed_tokens or decoder\.embed_tokens or lm_head"):
        model(input_ids=IDS, labels=IDS)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "error:.*must call an adapted layer")
@pytest.mark.parametrize("targets", [["encoder.embed_tokens"], ["decoder.embed_tokens", "lm_head"], ["lm_head", "q"]])
def test_an_embedding_that_is_called_is_not_told_of_its_twins(targets: list[str]) -> None:
    model = _attached(_t5(), *targets)
    for training in (True, False):
        model.train(training)(input_ids=IDS, labels=IDS)
    with torch.no_grad():
        model(encoder_outputs=model.get_encoder()(IDS), decoder_input_ids=IDS)


@pytest.mark.filterwarnings("error:.*must call an adapted layer")
@pytest.mark.parametrize("target", ["shared", "encoder.embed_tokens", "lm_head"])
@torch.no_grad()
def test_all_that_is_tied_to_the_embedding_shares_one_update(target: str, tmp_path: Path) -> None:
    """T5's encoder and decoder look rows of W + s B A up, and its output multiplies by them."""
    config = UniProjConfig(d=20, r=2, target_modules=[target], ensure_weight_tying=True)
    model, plain = get_peft_model(_t5(), config).train(), _t5()
    P, theta_d = adapter_of(model)
    theta_d.mul_(30)
    assert [(site.name, site.out_features, site.in_features) for site in P.layout.sites] == [("shared", 16, 32)]
    B, A = P.layout.split(P(theta_d))
    plain.shared.weight += (B @ A).T
    for call in ({"labels": IDS}, {"labels": IDS.flip(0)}):
        with torch.enable_grad():
            found = model.train()(input_ids=IDS, **call)
            found.loss.backward()
        torch.testing.assert_close(
            model.eval()(input_ids=IDS, **call).logits, plain.eval()(input_ids=IDS, **call).logits
        )
    assert theta_d.grad is not None and theta_d.grad.any()
    model.save_pretrained(tmp_path / "ours")
    loaded = PeftModel.from_pretrained(_t5(), tmp_path / "ours")
    assert torch.equal(loaded.eval()(input_ids=IDS, labels=IDS).logits, model(input_ids=IDS, labels=IDS).logits)
    with pytest.raises(AdapterError, match=r"export: PEFT ties .* got shared"):
        export(tmp_path / "ours", tmp_path / "lora")


def test_a_part_that_is_called_alone_is_watched_too() -> None:
    model = _attached(nn.ModuleDict({"part": Reader(lambda self: not self.training, READS["linear"])}), "lin")
    part = model.get_base_model()["part"]
    part.train()(torch.randn(3, 6))
    with pytest.raises(AdapterError, match=r"^part\.lin: "):
        part.eval()(torch.randn(3, 6))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_functions_that_call_adapted_layers(backend: str) -> None:
    compiled = torch.compile(lambda module, x: module.lin(x).sin(), backend=backend, fullgraph=True)
    model = _attached(Reader(lambda self: True, compiled), "lin", "other")
    for training in (True, False, True, False):
        with torch.set_grad_enabled(training):
            model.train(training)(torch.randn(3, 6))


def test_a_forward_that_fails_is_no_verdict() -> None:
    model = _attached(Reader(lambda self: True, READS["linear"]), "lin")
    model.get_base_model().other.register_forward_pre_hook(lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            model(torch.randn(3, 6))
    model.get_base_model().other._forward_pre_hooks.clear()
    with pytest.raises(AdapterError, match=r"^lin: "):
        model(torch.randn(3, 6))


def test_an_interrupt_leaves_no_watch_behind() -> None:
    model = _attached(Reader(lambda self: False, READS["linear"]), "lin")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.get_base_model().other.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(3, 6))
    handle.remove()
    model(torch.randn(3, 6))
    assert _get_current_dispatch_mode() is None


def test_copies_threads_and_compiled_blocks() -> None:
    model = get_peft_model(base_model("llama", num_hidden_layers=1), config("llama")).eval()
    twin, outputs = copy.deepcopy(model), []
    for block in twin.get_base_model().model.layers:
        block.compile(backend="eager")
    with torch.no_grad():
        threads = [threading.Thread(target=lambda: outputs.append(logits(model))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        outputs += [logits(model), logits(twin), logits(twin), logits(copy.deepcopy(twin))]
    assert len(outputs) == 8 and all(torch.allclose(logits, outputs[0], atol=1e-5) for logits in outputs)


def test_a_checkpointed_step_is_watched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its forward, and not in the parts that run again, which would be watched at every step."""
    model = get_peft_model(base_model("llama"), config("llama")).train()
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    watched: list[nn.Module] = []
    monkeypatch.setattr(
        bypass, "_Reads", lambda base, call, layers: watched.append(call[0]) or _Reads(base, call, layers)
    )
    for _ in range(3):
        model(**batch("llama")).loss.backward()
    assert watched == [model.get_base_model()]
