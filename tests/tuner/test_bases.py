"""Quantised and odd bases: the adapter learns, or the attach refuses; a merge says what it loses, or refuses."""

import math
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tests.compatibility.quantised import KINDS, MERGED, aqlm_layer, ordinary, quantised
from tests.compatibility.subjects import saved_llama
from tests.tuner.models import base_model, batch, config, logits, train_steps
from uniproj import AdapterError
from uniproj.format.places import places_of
from uniproj.tuner import UniProjConfig, adapter_of, shard_base
from uniproj.tuner.quantised import BaseWeights, dequantised


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of the base model that `quantised` reads."""
    return tmp_path_factory.mktemp("base")


def _scaled(base: nn.Module, by: float, **fields) -> PeftModel:
    model = get_peft_model(base, config("llama", **fields)).eval()
    with torch.no_grad():
        adapter_of(model).theta_d.mul_(by)
    return model


def _gradient(model: PeftModel) -> torch.Tensor:
    model.zero_grad()
    model(**batch("llama")).loss.backward()
    return adapter_of(model).theta_d.grad.clone()


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_leaves_a_quantised_base_trainable(kind: str, folder: Path) -> None:
    model = get_peft_model(quantised(folder, kind), config("llama"))
    before = _gradient(model.train())
    logits(model.eval())
    assert torch.equal(_gradient(model.train()), before)


@pytest.mark.parametrize("kind", MERGED)
def test_merging_a_large_adapter_warns_of_the_drift_it_has(kind: str, folder: Path) -> None:
    model = _scaled(quantised(folder, kind), 100.0)
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    wanted, changes = {}, {}
    for name, layer in layers.items():
        changes[name] = layer.get_delta_weight("default").detach().float()
        wanted[name] = dequantised(layer.get_base_layer()).detach().float() + changes[name]
    with pytest.warns(UserWarning, match="merge: quantising the base again moves") as warned:
        model.merge_adapter()
    told = [float(str(w.message).split(" by ")[1].split()[0]) for w in warned if "quantising" in str(w.message)]
    errors = sum(
        (dequantised(layer.get_base_layer()).float() - wanted[name]).square().sum() for name, layer in layers.items()
    )
    drift = math.sqrt(errors / sum(change.square().sum() for change in changes.values()))
    assert told == [pytest.approx(drift, abs=0.006)]
    assert 0.0 < drift < 0.5
    merged = {name: dequantised(layer.get_base_layer()) for name, layer in layers.items()}
    model.merge_adapter()  # which is merged already
    assert all(torch.equal(dequantised(layer.get_base_layer()), merged[name]) for name, layer in layers.items())


def test_merging_measures_the_adapters_that_are_named(folder: Path) -> None:
    model = _scaled(quantised(folder, "bitsandbytes, 8 bits"), 0.1)
    model.add_adapter("large", config("llama", init_seed=3))
    with torch.no_grad():
        adapter_of(model, "large").theta_d.mul_(100.0)
    with pytest.raises(AdapterError, match="must keep s B A"):
        model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="again moves"):
        model.merge_adapter(["large"])
    assert model.base_model.model.model.layers[0].mlp.down_proj.merged_adapters == ["large"]


def test_an_unquantised_merge_says_nothing(recwarn) -> None:
    _scaled(base_model("llama"), 1.0).merge_adapter()
    assert not [w for w in recwarn if "merge:" in str(w.message)]


def test_four_bit_weights_in_the_form_for_inference_are_refused(folder: Path) -> None:
    base = quantised(folder, "bitsandbytes, 4 bits (NF4)")
    base.model.layers[1].self_attn.o_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.o_proj: a 4-bit weight must have the form in which"):
        get_peft_model(base, config("llama"))
    assert not any("lora" in name for name, _ in base.named_modules())


@pytest.mark.parametrize("kind", ["bitsandbytes, 8 bits", "bitsandbytes, 4 bits (NF4)"])
def test_singular_factors_of_a_quantised_base_are_those_of_the_weights_it_stands_for(kind: str, folder: Path) -> None:
    fields = {"projection": "lora_xs", "d": None}
    base = quantised(folder, kind)
    plain = _scaled(ordinary(base), 1.0, **fields)
    ours = _scaled(base, 1.0, **fields)
    with torch.no_grad():
        adapter_of(ours).theta_d.fill_(0.3), adapter_of(plain).theta_d.fill_(0.3)
    delta, expected = (
        m.base_model.model.model.layers[1].mlp.down_proj.get_delta_weight("default") for m in (ours, plain)
    )
    torch.testing.assert_close(delta, expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item())


def test_the_weight_of_aqlm_is_the_sum_of_what_its_codes_name() -> None:
    layer = aqlm_layer(nn.Linear(16, 6))
    books, codes = layer.codebooks[:, :, 0].detach(), layer.codes.long() % 2**12
    wanted = torch.stack([torch.cat([sum(books[c, one[c]] for c in range(2)) for one in row]) for row in codes])
    wanted *= layer.scales.detach().view(-1, 1)
    torch.testing.assert_close(dequantised(layer), wanted, rtol=1e-5, atol=1e-7)
    found = BaseWeights(places_of("layer", layer))["layer"]
    assert found.shape == (6, 16) and torch.equal(found, dequantised(layer))


class EetqLinear(nn.Module):
    """Whole numbers (in, out) with a scale for each output, of which PEFT knows the name alone."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 3, 2
        self.weight = nn.Parameter(torch.tensor([[1, -2], [3, 4], [-5, 6]], dtype=torch.int8), requires_grad=False)
        self.register_buffer("weight_scales", torch.tensor([0.5, 0.25], dtype=torch.float16))
        self.register_buffer("bias", torch.tensor([1.0, -1.0], dtype=torch.float16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.float16
        return x @ (self.weight * self.weight_scales) + self.bias


def test_whole_numbers_are_no_weight() -> None:
    wanted = torch.tensor([[0.5, 1.5, -2.5], [-0.5, 1.0, 1.5]], dtype=torch.float16)
    assert torch.equal(dequantised(EetqLinear()), wanted)


def test_merging_into_hqq_keeps_the_bias() -> None:
    torch.manual_seed(0)
    config = BaseQuantizeConfig(nbits=8, group_size=32)
    layer = HQQLinear(nn.Linear(32, 32), config, compute_dtype=torch.float32, device="cpu")
    bias, x = layer.bias.clone(), torch.randn(3, 32)
    model = get_peft_model(nn.Sequential(layer), UniProjConfig(d=20, r=2, target_modules=["0"])).eval()
    with torch.no_grad():
        adapter_of(model).theta_d.mul_(60.0)
        wanted = model(x)
        with model.disable_adapter():
            bare = model(x)
        model.merge_adapter()
        assert torch.equal(model.base_model.model[0].base_layer.bias, bias)
        torch.testing.assert_close(model(x), wanted, rtol=0.05, atol=0.05)
        model.unmerge_adapter()
        with model.disable_adapter():
            torch.testing.assert_close(model(x), bare, rtol=0.05, atol=0.05)
        merged = model.merge_and_unload()
    assert type(merged[0]) is HQQLinear and torch.equal(merged[0].bias, bias) and bias.abs().min() > 0
    assert (wanted - bare).abs().max() > 0.5


def test_a_dead_layer_of_torchao_beside_an_ordinary_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are nn.Linear, and say that they hold float32."""
    base = nn.Sequential(OrderedDict(plain=nn.Linear(32, 32), packed=nn.Linear(32, 32)))
    quantize_(base, Int8WeightOnlyConfig(), filter_fn=lambda _, name: name == "packed")
    assert base.plain.weight.dtype == base.packed.weight.dtype and type(base.plain) is type(base.packed)
    monkeypatch.setattr(TorchaoLoraLinear, "forward", lambda self, x: self.base_layer(x))
    with pytest.raises(AdapterError, match=r"^packed: its A and B must move the output of Linear layers"):
        get_peft_model(base, UniProjConfig(d=20, r=2, target_modules=["plain", "packed"]))


def test_an_embedding_of_torchao_is_refused() -> None:
    base = nn.Sequential(OrderedDict(emb=nn.Embedding(40, 32)))
    quantize_(base, Int8WeightOnlyConfig(), filter_fn=lambda _, name: name == "emb")
    with pytest.raises(AdapterError, match=r"^emb: an embedding must have a weight of floats .* got one of torchao"):
        get_peft_model(base, UniProjConfig(d=20, r=2, target_modules=["emb"]))
    assert type(base.emb) is nn.Embedding


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kind", ["torchao, 8 bits", "HQQ, 8 bits", "AQLM"])
def test_a_packed_base_is_not_sharded(kind: str, folder: Path) -> None:
    model = get_peft_model(quantised(folder, kind), config("llama"))
    with pytest.raises(AdapterError, match=r"shard_base: the base must not be quantised, got .*layers\.0\.self_attn"):
        shard_base(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merging_into_half_precision_loses_a_rounding_of_the_weights(dtype: torch.dtype) -> None:
    model = _scaled(base_model("llama").to(dtype), 1.0)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    wanted = layer.base_layer.weight.detach().double() + layer.get_delta_weight("default").detach().double()
    merged = model.merge_and_unload().model.layers[0].mlp.down_proj.weight.double()
    assert ((merged - wanted).abs() <= torch.finfo(dtype).eps * wanted.abs() + 1e-6).all()


# ---- layers ------------------------------------------------------------------------------------------


COMPUTED = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "weight_norm of old": nn.utils.weight_norm,
    "spectral_norm of old": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("norm", COMPUTED)
def test_a_merge_into_a_weight_that_is_computed_is_refused(norm: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(OrderedDict(normed=COMPUTED[norm](nn.Linear(6, 6)), plain=nn.Linear(6, 6)))
    model = get_peft_model(base, UniProjConfig(d=20, r=2, target_modules=["normed", "plain"])).eval()
    x = torch.randn(3, 6)
    before = model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdapterError, match=r"the weight of normed must be a Parameter.*Keep the adapter unmerged"):
            merge()
        assert torch.equal(model(x), before)
    layer = base.normed.base_layer
    assert torch.equal(dequantised(layer), layer.weight)


@pytest.mark.parametrize("projection", ["unilora", "fastfood"])
def test_P_has_no_buffers_for_ddp_to_exchange(projection: str) -> None:
    model = get_peft_model(base_model("llama"), config("llama", projection))
    train_steps(model, "llama", 2)
    assert [name for name, _ in model.named_buffers()] == [
        f"base_model.model.{n}" for n, _ in base_model("llama").named_buffers()
    ]


# ---- device_map --------------------------------------------------------------------------------------

PLACES = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}


def test_a_dead_layer_on_disk_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(LoraLinear, "forward", lambda self, x, *args, **kwargs: self.base_layer(x))
    places = {**PLACES, "model.layers.1": "disk", "lm_head": "cpu"}
    offloaded = AutoModelForCausalLM.from_pretrained(saved_llama(tmp_path), device_map=places, offload_folder=tmp_path)
    with pytest.raises(AdapterError, match="its A and B must move the output of Linear layers"):
        get_peft_model(offloaded, config("llama", target_modules=r".*layers\.1\.mlp\.down_proj"))


def test_a_base_may_call_its_modules_as_the_tuner_does() -> None:
    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projections = nn.ModuleList([nn.Linear(8, 8)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.projections[0](x)

    model = get_peft_model(Base(), UniProjConfig(r=2, d=8, target_modules=["projections.0"]))
    assert model(torch.ones(2, 8)).shape == (2, 8) and adapter_of(model).theta_d.shape == (8,)


def test_names_of_a_base_that_look_like_peft_s_stay(tmp_path: Path) -> None:
    """`base_layer` is what PEFT calls the layer within its own; a fingerprint has the names that the base has."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict(
            {"net": nn.ModuleDict({"base_layers": nn.ModuleList([nn.Linear(6, 6)]), "base_layer_2": nn.Linear(6, 6)})}
        )

    model, x = get_peft_model(base(), UniProjConfig(d=20, r=2, target_modules=["0", "base_layer_2"])), torch.ones(1, 6)
    assert adapter_of(model).P.layout.modules == ("net.base_layer_2", "net.base_layers.0")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    for name in ("base_layers.0", "base_layer_2"):
        found, wanted = (m.get_base_model()["net"].get_submodule(name)(x) for m in (again, model))
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("module", [Conv1D(6, 4), nn.Embedding(4, 6), nn.Conv1d(4, 6, 3)], ids=repr)
def test_the_matrices_of_a_parameter_lie_as_the_parameter_does(module: nn.Module) -> None:
    """PEFT adds B A to it as it is, whatever the module makes of it."""
    found = BaseWeights(places_of("weight", module, "weight"))
    W = module.weight
    wanted = {"weight": W} if W.ndim == 2 else {f"weight.{i}": W[i] for i in range(6)}
    assert {name: x.tolist() for name, x in found.items()} == {name: x.tolist() for name, x in wanted.items()}
