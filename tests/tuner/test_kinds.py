"""Embeddings, convolutions and attentions: each kind computes, learns, merges and mixes as its formula says."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.models.whisper.modeling_whisper import WhisperPositionalEmbedding

from tests.tuner.models import SIZES, make, train_steps
from uniproj import AdapterError, get, names
from uniproj.bank import mixed
from uniproj.tuner import UniProjConfig, adapter_of
from uniproj.tuner.layers import OutProjection, _Attention

IDS = torch.tensor([[1, 5, 0, 7, 2], [3, 3, 8, 10, 0]])
WORDS = 11


class Net(nn.Module):
    """An embedding, then `layer`, on (rows, channels, ...) or, for an attention, on (rows, tokens, channels)."""

    def __init__(self, layer: nn.Module | None = None, dim: int = 8, ends: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(WORDS, dim, padding_idx=0)
        self.layer, self.last = layer, nn.Linear(dim, ends)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        if isinstance(self.layer, nn.Module):
            base = getattr(self.layer, "base_layer", self.layer)
            if isinstance(base, nn.MultiheadAttention):
                x = x + self.layer(x, x, x)[0]
            else:
                axes = base.weight.ndim - 2
                image = x.mT.reshape(*x.mT.shape, *[1] * (axes - 1)).expand(-1, -1, -1, *[4] * (axes - 1))
                # so that the places differ
                image = image * torch.linspace(1, 2, image[0, 0].numel(), dtype=x.dtype).view(image.shape[2:])
                x = self.layer(image).flatten(2).mT
        return self.last(x)


LAYERS = {
    "Embedding": lambda: None,
    "Conv1d": lambda: nn.Conv1d(8, 8, 3, padding=1),
    "Conv2d": lambda: nn.Conv2d(8, 8, (3, 2), stride=(1, 2), padding=(1, 0)),
    "Conv2d of a point": lambda: nn.Conv2d(8, 8, 1),
    "Conv3d": lambda: nn.Conv3d(8, 8, (2, 3, 1), padding=(0, 1, 0)),
    "Conv3d of a point": lambda: nn.Conv3d(8, 8, 1),
    "grouped": lambda: nn.Conv1d(8, 8, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(8, 8, 2, groups=4, bias=False),
    "dilated": lambda: nn.Conv1d(8, 8, 3, padding=2, dilation=2),
    "reflecting": lambda: nn.Conv1d(8, 8, 3, padding="same", padding_mode="reflect"),
    "attention": lambda: nn.MultiheadAttention(8, 2, batch_first=True),
}
# what PEFT's own LORA computes otherwise: A without dilation and with zeros around x, out_proj's s B A twice
OTHERWISE = {"dilated", "reflecting", "attention"}
GROUPED = {"grouped", "depthwise"}
TARGETS = ["emb", "layer", "last"]


def _config(kind: str, projection: str = "unilora", **fields) -> UniProjConfig:
    """One rank for all: PEFT's r is parted among the groups of a convolution."""
    groups = getattr(LAYERS[kind](), "groups", 1)
    targets = TARGETS if kind != "Embedding" else ["emb", "last"]
    given = {"r": 2, "lora_alpha": 3, "rank_pattern": {"layer": 2 * groups}, "target_modules": targets, **fields}
    if projection == "tinylora":
        given = {"projection_kwargs": {"u": 4}, **given}
    return UniProjConfig(projection=projection, **({"d": 24} if get(projection).free_d else {}) | given)


def _attached(kind: str, projection: str = "unilora", dtype: torch.dtype = torch.float32, **fields) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LoRA adapter added to ConvNd layer with groups")
        warnings.filterwarnings("error", ".*could not be probed")
        model = get_peft_model(Net(LAYERS[kind]()).to(dtype), _config(kind, projection, **fields))
    _moved(model)
    return model


def _moved(model: PeftModel, seed: int = 1, name: str = "default") -> None:
    theta_d = adapter_of(model, name).theta_d
    with torch.no_grad():
        theta_d.add_(0.2 * torch.randn(theta_d.shape, generator=torch.Generator().manual_seed(seed)))


def _dense(model: PeftModel, kind: str, theta_D: Tensor, ids: Tensor = IDS) -> Tensor:
    """The network by PyTorch's operators in float64, from theta_D alone."""
    net = model.get_base_model()
    P = adapter_of(model).P
    blocks = dict(zip([(b.module, b.factor) for b in P.layout.blocks], P.layout.split(theta_D.double()), strict=True))

    def delta(name: str, rank: int = 2) -> Tensor:
        return 3 / rank * blocks[name, "B"] @ blocks[name, "A"]

    def weights(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
        base = getattr(layer, "base_layer", layer)
        return base.weight.double(), None if base.bias is None else base.bias.double()

    E = net.emb.base_layer.weight.double() + delta("emb").T
    x = E[ids]
    layer = getattr(net.layer, "base_layer", net.layer)
    if isinstance(layer, nn.MultiheadAttention):
        W, b = layer.in_proj_weight.double() + delta("layer"), layer.in_proj_bias.double()
        heads = [t.unflatten(-1, (2, -1)).transpose(1, 2) for t in F.linear(x, W, b).chunk(3, -1)]
        W, b = weights(layer.out_proj)
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(-2)
        x = x + F.linear(attended, W + delta("layer.out_proj"), b)
    elif layer is not None:
        axes = layer.weight.ndim - 2
        image = x.mT.reshape(*x.mT.shape, *[1] * (axes - 1)).expand(-1, -1, -1, *[4] * (axes - 1))
        image = image * torch.linspace(1, 2, image[0, 0].numel(), dtype=x.dtype).view(image.shape[2:])
        of, padding = (F.conv1d, F.conv2d, F.conv3d)[axes - 1], layer.padding
        if layer.padding_mode == "reflect":
            image, padding = F.pad(image, (1, 1), mode="reflect"), 0
        W, b = weights(layer)
        y = of(image, W, b, layer.stride, padding, layer.dilation, layer.groups)
        shape = (-1, layer.in_channels, *layer.kernel_size)
        g = layer.groups
        changes = [delta(f"layer.{i}", 2 * g) for i in range(g)] if g > 1 else [delta("layer")]
        change = torch.cat(changes).view(shape)  # every output sees all channels
        x = (y + of(image, change, None, layer.stride, padding, layer.dilation)).flatten(2).mT
    W, b = weights(net.last)
    return F.linear(x, W + delta("last"), b)


@pytest.mark.parametrize("projection", names())
@pytest.mark.parametrize("kind", LAYERS)
def test_every_projection_on_every_kind(kind: str, projection: str) -> None:
    """Forward by the formula; the gradient is the adjoint's of the one on theta_D."""
    model = _attached(kind, projection)
    P, theta_d = adapter_of(model)
    theta_D = P(theta_d).detach().double().requires_grad_()
    wanted = _dense(model, kind, theta_D)
    found = model(IDS)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-4)
    found.square().sum().backward()
    wanted.square().sum().backward()
    gradient = theta_D.grad
    tokens, shape = P.layout.block("emb", "A"), (2, WORDS)
    gradient[tokens.rows] = gradient[tokens.rows].view(shape).index_fill(1, torch.tensor(0), 0.0).flatten()  # padding
    for parameter in (theta_d, *P.parameters()):
        (expected,) = torch.autograd.grad(P(theta_d), parameter, gradient.float())
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    if not list(P.parameters()):
        torch.testing.assert_close(theta_d.grad, P.adjoint(gradient.float()), rtol=1e-3, atol=1e-3)
    assert theta_d.grad.any()


# ---- as PEFT's LORA ------------------------------------------------------------------------------


def _peft_lora(kind: str, model: PeftModel, **fields) -> PeftModel:
    """PEFT's LORA with the factors of a model, by keys and shapes of its own."""
    own = _config(kind)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=own.target_modules, rank_pattern=own.rank_pattern, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(Net(LAYERS[kind]()), config)
    P, theta_d = adapter_of(model)
    views = {(b.module, b.factor): v for b, v in zip(P.layout.blocks, P.layout.split(P(theta_d).detach()), strict=True)}
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_" in key:
                name = key.removeprefix("base_model.model.").partition(".lora_")[0].replace(".base_layer", "")
                factor = "AB"["_B" in key]
                found = [v for (module, f), v in views.items() if f == factor and module.startswith(name)]
                parts = [v for (module, f), v in views.items() if (module, f) == (name, factor)] or found
                parameter.copy_(torch.cat(parts).view_as(parameter))
    return theirs


@pytest.mark.parametrize("kind", sorted(set(LAYERS) - OTHERWISE))
def test_the_same_factors_in_peft_give_the_same(kind: str) -> None:
    model = _attached(kind)
    torch.testing.assert_close(model(IDS), _peft_lora(kind, model)(IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(set(LAYERS) - GROUPED))
@pytest.mark.parametrize("safe", [False, True])
def test_merging_and_back(kind: str, safe: bool) -> None:
    model = _attached(kind).eval()
    before = {name: p.detach().clone() for name, p in model.get_base_model().named_parameters()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted = model(IDS)
        with model.disable_adapter():
            plain = model(IDS)
        torch.testing.assert_close(plain, Net(LAYERS[kind]())(IDS), rtol=1e-5, atol=1e-5)
        model.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(model(IDS), wanted, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        after = dict(model.get_base_model().named_parameters())
        assert list(after) == list(before)
        for name, parameter in after.items():
            torch.testing.assert_close(parameter, before[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(IDS), wanted, rtol=1e-4, atol=1e-4)
        merged = model.merge_and_unload(safe_merge=safe)
    assert [type(m) for m in merged.modules()] == [type(m) for m in Net(LAYERS[kind]()).modules()]
    torch.testing.assert_close(merged(IDS), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wanted, plain, atol=1e-2)


@pytest.mark.parametrize("kind", sorted(GROUPED))
def test_a_grouped_convolution_has_no_weight_to_merge_into(kind: str) -> None:
    model = _attached(kind)
    before = model(IDS)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdapterError, match=r"merge: the weight of layer must see all channels.*[24] groups"):
            merge()
    assert torch.equal(model(IDS), before)


@pytest.mark.parametrize("kind", ["Embedding4bit", "Embedding8bit"])
def test_quantised_embeddings_learn_and_do_not_merge(kind: str) -> None:
    base = nn.ModuleDict({"emb": getattr(bitsandbytes.nn, kind)(64, 64)}).to("cpu")
    model = get_peft_model(base, UniProjConfig(d=20, r=2, target_modules=["emb"]))
    _moved(model)
    emb = model.get_base_model()["emb"]
    delta = emb.get_delta_weight("default")
    torch.testing.assert_close(emb(IDS) - emb.base_layer(IDS), delta[IDS], rtol=1e-4, atol=1e-5)
    emb(IDS).sum().backward()
    assert adapter_of(model).theta_d.grad.any()
    with pytest.raises(AdapterError, match="merge: the weight of emb must be floats, got a quantised embedding"):
        model.merge_adapter()


class Packed(nn.Module):
    """A linear layer of whole numbers, as the packages keep them that do not install everywhere."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("qweight", torch.arange(in_features * out_features, dtype=torch.int32) % 7 - 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.qweight.view(self.in_features, self.out_features).to(x.dtype)


def _gptq(patch: pytest.MonkeyPatch) -> None:
    package = ModuleType("gptqmodel.nn_modules.qlinear")
    package.BaseQuantLinear, package.__spec__ = Packed, ModuleSpec("gptqmodel", None)
    for name in ("gptqmodel", "gptqmodel.nn_modules", package.__name__):
        patch.setitem(sys.modules, name, package)
    patch.setattr(lora.gptq, "is_gptqmodel_available", lambda: True)
    patch.setattr(lora.awq, "is_gptqmodel_available", lambda: False)  # it would look for the installed one


def _awq(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lora.awq, "is_gptqmodel_available", lambda: True)
    patch.setattr(lora.awq, "is_gptqmodel_awq_layer", lambda module: isinstance(module, Packed))


@pytest.mark.parametrize("package", [_gptq, _awq], ids=["GPTQ", "AWQ"])
def test_wrappers_of_packed_layers(package: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's layer computes base(x) + s B A x, the probe finds it alive at once, and a merge refuses; LoRA-XS is made
    of the weight."""
    package(monkeypatch)
    base = nn.Sequential(Packed(6, 4), nn.PReLU(init=1.0))  # PEFT asks a Parameter for the device
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*could not be probed")
        model = get_peft_model(base, UniProjConfig(d=20, r=2, lora_alpha=3, target_modules=["0"]))
    _moved(model)
    P, theta_d = adapter_of(model)
    B, A = P.layout.split(P(theta_d))
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(model(x), Packed(6, 4)(x) + 1.5 * x @ A.T @ B.T)
    model(x).sum().backward()
    assert theta_d.grad.any()
    with pytest.raises(AdapterError, match=r"merge: 0 must be of a kind that PEFT merges, got \w+LoraLinear, which"):
        model.merge_adapter()
    base = nn.Sequential(Packed(6, 4), nn.PReLU(init=1.0))
    P = adapter_of(get_peft_model(base, UniProjConfig(projection="lora_xs", r=4, target_modules=["0"]))).P
    B, A = P.layout.split(P(torch.eye(4).flatten()))
    torch.testing.assert_close(B @ A, Packed(6, 4)(torch.eye(6)).T, rtol=1e-4, atol=1e-4)


# ---- numbers -------------------------------------------------------------------------------------

ROUGH = {torch.float64: 1e-4, torch.bfloat16: 0.08, torch.float16: 0.01}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", ROUGH)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_bases_of_other_dtypes(kind: str, dtype: torch.dtype, autocast_adapter_dtype: bool) -> None:
    base = Net(LAYERS[kind]()).to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LoRA adapter added to ConvNd layer with groups")
        warnings.filterwarnings("error", ".*could not be probed")
        model = get_peft_model(base, _config(kind), autocast_adapter_dtype=autocast_adapter_dtype)
    _moved(model)
    P, theta_d = adapter_of(model)
    found = model(IDS)
    assert found.dtype == dtype and theta_d.dtype == torch.float32
    wanted = _dense(model, kind, P(theta_d).detach())
    assert (found.double() - wanted).norm() < ROUGH[dtype] * wanted.norm()
    found.sum().backward()
    assert theta_d.grad.any() and theta_d.grad.isfinite().all()


@pytest.mark.parametrize("kind", LAYERS)
def test_under_autocast(kind: str) -> None:
    model = _attached(kind)
    exact = model(IDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(IDS)
    assert (found.float() - exact).norm() < 0.05 * exact.norm()
    found.float().sum().backward()
    assert adapter_of(model).theta_d.grad.any()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_within_gradient_checkpointing(kind: str, reentrant: bool) -> None:
    gradients = []
    for checkpointed in (True, False):
        model = _attached(kind)
        body = model.get_base_model()
        x = torch.ones(1, requires_grad=True)

        def call(x: Tensor, body: nn.Module = body) -> Tensor:
            return body(IDS) * x

        y = checkpoint(call, x, use_reentrant=reentrant) if checkpointed else call(x)
        y.square().sum().backward()
        gradients.append(adapter_of(model).theta_d.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].any()


# ---- the life of an adapter ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_copies_files_and_a_second_adapter(kind: str, tmp_path: Path) -> None:
    model = _attached(kind).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = model(IDS)
        assert torch.equal(copy.deepcopy(model)(IDS), wanted)
        model.save_pretrained(tmp_path)
        for little in (False, True):
            again = PeftModel.from_pretrained(Net(LAYERS[kind]()), tmp_path, low_cpu_mem_usage=little)
            assert torch.equal(again(IDS), wanted)
        model.add_adapter("other", _config(kind, "fastfood", init_seed=4))
        _moved(model, 2, "other")
        assert torch.equal(model(IDS), wanted)
        model.set_adapter("other")
        theirs = model(IDS)
        assert not torch.allclose(theirs, wanted, atol=1e-3)
        model.base_model.set_adapter(["default", "other"])
        both = model(IDS)
        assert not torch.allclose(both, theirs, atol=1e-3) and not torch.allclose(both, wanted, atol=1e-3)
        model.set_adapter("default")
        model.delete_adapter("other")
    assert torch.equal(model(IDS), wanted)


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_without_its_last_adapter_a_model_is_its_base(kind: str) -> None:
    model = _attached(kind)
    net = model.get_base_model()
    model.delete_adapter("default")
    torch.testing.assert_close(net(IDS), Net(LAYERS[kind]())(IDS), rtol=1e-5, atol=1e-5)


def test_every_active_adapter_of_an_attention_gets_its_gradient() -> None:
    model = _attached("attention")
    model.add_adapter("other", _config("attention", init_seed=4))
    model.base_model.set_adapter(["default", "other"])
    attention, x = model.get_base_model().layer, torch.randn(2, 3, 8)
    attention(x, x, x)[0].square().sum().backward()
    assert all(adapter_of(model, name).theta_d.grad.any() for name in ("default", "other"))


@torch.no_grad()
def test_an_error_within_an_attention_leaves_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when memory runs out and a smaller batch is tried next."""
    model = _attached("attention")
    wanted = model(IDS)
    with monkeypatch.context() as patch:
        patch.setattr(OutProjection, "get_delta_weight", lambda *_: torch.empty(()).expand(3, 3))
        with pytest.raises(RuntimeError):
            model(IDS)
    assert torch.equal(model(IDS), wanted)


@pytest.mark.parametrize("kind", ["Embedding", "Conv1d", "grouped", "reflecting"])
def test_compiled_without_a_break(kind: str) -> None:
    model = _attached(kind).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS), model(IDS))


# ---- the probe and the guard ---------------------------------------------------------------------


def _without_adapter(self, *args, **kwargs):
    return self.base_layer(*args, **kwargs)


DEAD = {
    "Embedding": (lora.Embedding, "emb: its A and B must move the output of Embedding"),
    "Conv1d": (lora.layer._ConvNd, "layer: its A and B must move the output of Conv1d"),
    "Conv2d": (lora.layer._ConvNd, "layer: its A and B must move the output of Conv2d"),
    "Conv3d": (lora.layer._ConvNd, "layer: its A and B must move the output of Conv3d"),
    "grouped": (lora.layer._ConvNd, "layer: its A and B must move the output of Conv1d"),
    "attention": (_Attention, "layer: its A and B must move the output of MultiheadAttention"),
}


@pytest.mark.parametrize("kind", DEAD)
def test_a_dead_layer_is_found_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, message = DEAD[kind]
    monkeypatch.setattr(layer, "forward", _without_adapter)
    with pytest.raises(AdapterError, match=message):
        _attached(kind)


class Experts(nn.Module):
    """Two experts of two parameters each, which PEFT adapts by one layer around another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Parameter(torch.randn(2, 6, 8)), nn.Parameter(torch.randn(2, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ehi,ti->eth", self.up, x).relu().matmul(self.down.mT).sum(0)


def _experts(parameters: list[str], experts: nn.Module | None = None, modules: list[str] | None = None) -> PeftModel:
    named = [f"experts.{name}" for name in parameters]
    config = UniProjConfig(d=20, r=2, target_modules=modules or [], target_parameters=named)
    return get_peft_model(nn.ModuleDict({"experts": experts or Experts()}), config)


@pytest.mark.parametrize("parameters", [["up"], ["down"], ["up", "down"]])
def test_experts_are_probed_at_their_first_calls(parameters: list[str], recwarn) -> None:
    model, x = _experts(parameters), torch.randn(5, 8)
    experts = model.get_base_model()["experts"]

    def probes() -> int:
        return sum(isinstance(hook, partial) for m in model.modules() for hook in m._forward_hooks.values())

    assert probes() == len(parameters)
    outputs = []
    for training in (True, False, True):
        model.train(training)
        outputs.append(experts(x))
    assert all(torch.equal(y, outputs[0]) for y in outputs) and probes() == 0
    assert type(experts.get_base_layer()) is Experts and not [w for w in recwarn if "probed" in str(w.message)]


@pytest.mark.parametrize("parameter", ["up", "down"])
def test_an_expert_that_is_read_elsewhere_is_refused(parameter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _experts(["up", "down"]), torch.randn(5, 8)
    plain = Experts()
    forward = Experts.forward

    def passing_by(self: Experts, x: Tensor) -> Tensor:
        """Takes one of the two parameters from another place, as a kernel with weights of its own would."""
        twin = copy.copy(plain)
        other = "down" if parameter == "up" else "up"
        twin._parameters = {parameter: plain._parameters[parameter]}
        twin.__dict__[other] = getattr(self, other)
        return forward(twin, x)

    monkeypatch.setattr(Experts, "forward", passing_by)
    with pytest.raises(AdapterError, match=rf"experts\.{parameter}: its A and B must move the output of Experts"):
        model.get_base_model()["experts"](x)


class Headed(Experts):
    """Experts with a layer within, which PEFT adapts within the layers around the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x))


@pytest.mark.parametrize("way", ["merge_and_unload", "unload"])
@torch.no_grad()
def test_what_lies_within_experts_is_merged_and_unloaded_with_them(way: str) -> None:
    model, x = _experts(["up", "down"], Headed(), ["head"]), torch.randn(5, 8)
    experts = model.get_base_model()["experts"]
    _moved(model)
    with model.disable_adapter():
        bare = experts(x)
    wanted = experts(x) if way == "merge_and_unload" else bare
    plain = getattr(model, way)()
    assert [type(module) for module in plain.modules()] == [nn.ModuleDict, Headed, nn.Linear]
    torch.testing.assert_close(plain["experts"](x), wanted, rtol=1e-4, atol=1e-3)
    assert way == "unload" or (wanted - bare).abs().max() > 0.1


@torch.no_grad()
def test_the_kernel_of_a_convolution_is_a_parameter_too_with_one_matrix_for_each_output() -> None:
    torch.manual_seed(0)
    base, x = nn.ModuleDict({"conv": nn.Conv1d(4, 6, 3)}), torch.randn(2, 4, 5)
    model = get_peft_model(base, UniProjConfig(d=20, r=2, target_modules=[], target_parameters=["conv.weight"]))
    _moved(model)
    P, theta_d = adapter_of(model)
    blocks = {(b.module, b.factor): v for b, v in zip(P.layout.blocks, P.layout.split(P(theta_d)), strict=True)}
    delta = torch.stack([blocks[f"conv.weight.{i}", "B"] @ blocks[f"conv.weight.{i}", "A"] for i in range(6)])
    conv = base["conv"].base_layer
    torch.testing.assert_close(base["conv"](x), F.conv1d(x, conv.weight + delta, conv.bias), rtol=1e-4, atol=1e-5)
    assert delta.abs().max() > 1e-3


PAST = {
    "Conv1d": lambda x, layer: F.conv1d(x.mT, layer.weight, layer.bias).mT,
    "attention": lambda x, layer: F.linear(x, layer.in_proj_weight, layer.in_proj_bias),
}


@pytest.mark.parametrize("kind", PAST)
def test_a_model_that_reads_the_weight_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Net, "forward", lambda self, ids: PAST[kind](self.emb(ids), self.layer))
    with pytest.raises(AdapterError, match=r"^layer: the model must call this layer, got a forward"):
        _attached(kind)(IDS)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}])
def test_embeddings_that_change_or_pick_rows_of_A_are_refused(options: dict) -> None:
    base = nn.ModuleDict({"emb": nn.Embedding(5, 4, **options)})
    with pytest.raises(AdapterError, match=r"^emb: an adapted embedding must have neither max_norm"):
        get_peft_model(base, UniProjConfig(d=5, r=2, target_modules=["emb"]))
    assert type(base["emb"]) is nn.Embedding


POSITIONS = {
    "bart": lambda: BartLearnedPositionalEmbedding(WORDS, 8),
    "opt": lambda: OPTLearnedPositionalEmbedding(WORDS, 8),
    "whisper": lambda: WhisperPositionalEmbedding(WORDS, 8),
}


@pytest.mark.parametrize("kind", POSITIONS)
@torch.no_grad()
def test_an_embedding_of_positions_is_adapted_by_its_weight_alone(kind: str) -> None:
    """PEFT's layer looks the given tokens up in A, and the base their positions in W."""
    torch.manual_seed(0)
    base, ids = nn.ModuleDict({"emb": POSITIONS[kind]()}), torch.ones(2, 4, dtype=torch.int64)
    with pytest.raises(AdapterError, match="emb: an adapted embedding must give the rows that its input names"):
        get_peft_model(base, UniProjConfig(d=20, r=2, target_modules=["emb"]))
    plain = copy.deepcopy(base["emb"])
    model = get_peft_model(base, UniProjConfig(d=20, r=2, target_modules=[], target_parameters=["emb.weight"]))
    _moved(model)
    plain.weight += base["emb"].get_delta_weight("default")
    torch.testing.assert_close(base["emb"](ids), plain(ids), rtol=1e-4, atol=1e-5)


# ---- mixed batches -------------------------------------------------------------------------------

ROWS = [1, 0]


def _thetas(model: PeftModel) -> Tensor:
    return torch.randn(2, adapter_of(model).P.d, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("projection", ["unilora", "lora_xs"])
@pytest.mark.parametrize("kind", sorted(set(LAYERS) - {"attention"}))
def test_each_row_of_a_mixed_batch_is_as_alone(kind: str, projection: str) -> None:
    model = _attached(kind, projection)
    theta_d = adapter_of(model).theta_d
    thetas = nn.Parameter(_thetas(model))
    with mixed(model, thetas, ROWS):
        found = model(IDS)
        found.square().sum().backward()
    for row, user in enumerate(ROWS):
        with torch.no_grad():
            theta_d.copy_(thetas[user])
        theta_d.grad = None
        alone = model(IDS[row : row + 1])
        alone.square().sum().backward()
        torch.testing.assert_close(found[row], alone[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(thetas.grad[user], theta_d.grad, rtol=1e-3, atol=1e-3)


class Causal(nn.Conv1d):
    """Sees nothing to the right, as those of speech models do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.dilation[0] * (self.kernel_size[0] - 1), 0)))


@torch.no_grad()
def test_a_convolution_that_pads_in_its_own_way_is_adapted_and_merged() -> None:
    torch.manual_seed(0)
    base, x = nn.ModuleDict({"conv": Causal(4, 6, 3, dilation=2)}), torch.randn(2, 4, 7)
    bare = base["conv"](x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(base, UniProjConfig(d=20, r=2, target_modules=["conv"]))
    thetas = _thetas(model)
    with mixed(model, thetas, ROWS):
        found = base["conv"](x)
    for row, user in enumerate(ROWS):
        adapter_of(model).theta_d.copy_(thetas[user])
        torch.testing.assert_close(found[row], base["conv"](x[row : row + 1])[0], rtol=1e-4, atol=1e-5)
    wanted = base["conv"](x)
    torch.testing.assert_close(model.merge_and_unload()["conv"](x), wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - bare).abs().max() > 1e-2


def test_rows_that_a_layer_cannot_tell_apart_are_refused() -> None:
    model = _attached("attention")
    with mixed(model, _thetas(model), ROWS), pytest.raises(AdapterError, match="mixed: layer must tell the rows of a"):
        model(IDS)
    model = _attached("Conv1d")
    net, thetas = model.get_base_model(), _thetas(model)
    with mixed(model, thetas, ROWS):
        with pytest.raises(AdapterError, match=r"mixed: emb must get \(rows .*, tokens\) = \(2, \.\.\), got \(5,\)"):
            net.emb(IDS[0])
        with pytest.raises(
            AdapterError, match=r"layer must get \(rows .*, channels, \.\.\) = \(2, 8, \.\.\), got \(8, 5\)"
        ):
            net.layer(torch.ones(8, 5))
    with mixed(model, thetas, ROWS), model.disable_adapter():
        torch.testing.assert_close(model(IDS), Net(LAYERS["Conv1d"]())(IDS))


# ---- embeddings of language models ---------------------------------------------------------------


def _language_model(tied: bool, scaled: bool) -> nn.Module:
    sizes = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    if scaled:
        return make(Gemma3ForCausalLM, Gemma3TextConfig(**sizes, head_dim=8))
    return make(LlamaForCausalLM, LlamaConfig(**sizes))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("scaled", [False, True], ids=["llama", "gemma"])
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_of_language_models(tied: bool, scaled: bool) -> None:
    """Tied ones: the output keeps the weight of the base, as in PEFT, and a merge would change it."""
    base = _language_model(tied, scaled)
    base.resize_token_embeddings(70, mean_resizing=False)
    ids = torch.tensor([[1, 69, 66, 3]])
    config = UniProjConfig(d=60, r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    losses = train_steps(model, "llama", lr=0.01)
    assert losses[-1] < losses[0]
    embedding = model.get_input_embeddings()
    x = embedding(ids)
    delta = embedding.get_delta_weight("default")
    scale = 32**0.5 if scaled else 1.0
    torch.testing.assert_close(x, (embedding.base_layer.weight + delta)[ids] * scale, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        wanted = model.eval()(ids).logits
        with mixed(model, adapter_of(model).theta_d[None].clone(), [0]):
            torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-3)
        if tied:
            with pytest.raises(
                AdapterError, match=r"merge: the weight of .*embed_tokens must be its own, got .*lm_head"
            ):
                model.merge_and_unload()
        else:
            torch.testing.assert_close(model.merge_and_unload()(ids).logits, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("tokens", [[1, 2], {"embed_tokens": [1, 2]}])
def test_an_embedding_is_adapted_or_has_trained_tokens(tokens: list | dict) -> None:
    base = _language_model(tied=False, scaled=False)
    fields = {"d": 60, "r": 4, "task_type": "CAUSAL_LM", "trainable_token_indices": tokens}
    with pytest.raises(AdapterError, match=r"^trainable_token_indices: model.embed_tokens must be adapted or have"):
        get_peft_model(base, UniProjConfig(**fields, target_modules=["embed_tokens", "q_proj"]))
    assert type(base.get_input_embeddings()) is nn.Embedding
    model = get_peft_model(base, UniProjConfig(**fields, target_modules=["q_proj"]))
    losses = train_steps(model, "llama")
    assert losses[-1] < losses[0]
    adapting = UniProjConfig(**{**fields, "trainable_token_indices": None}, target_modules=["embed_tokens"])
    other = get_peft_model(_language_model(tied=False, scaled=False), copy.deepcopy(adapting))
    for targets in (["embed_tokens"], ["q_proj"]):
        with pytest.raises(AdapterError, match=r"^trainable_token_indices: model.embed_tokens must be adapted or have"):
            other.add_adapter("two", UniProjConfig(**fields, target_modules=targets))
    with pytest.raises(AdapterError, match=r"^trainable_token_indices: model.embed_tokens must be adapted or have"):
        model.add_adapter("two", adapting)
    model.add_adapter("two", UniProjConfig(d=60, r=4, task_type="CAUSAL_LM", target_modules=["v_proj"]))
