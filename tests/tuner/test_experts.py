"""Experts that are one parameter: `target_parameters` through the whole life of an adapter, one module per expert."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn.utils import parametrize
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.tuner.models import SIZES, batch, logits, make, train_steps
from uniproj import AdapterError
from uniproj.bank import mixed
from uniproj.exchange.verify import verify
from uniproj.tuner import UniProjConfig, adapter_of, shard_base
from uniproj.tuner.liveness import _is_alive

EXPERTS, HIDDEN, INNER = 4, 32, 16
_GROUPED = {**SIZES, "num_key_value_heads": 2}
BASES: dict[str, Callable[[], Any]] = {
    "qwen3_moe": lambda: make(
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**_GROUPED, moe_intermediate_size=INNER, num_experts=EXPERTS, num_experts_per_tok=2, head_dim=8),
    ),
    "mixtral": lambda: make(
        MixtralForCausalLM, MixtralConfig(**_GROUPED, intermediate_size=INNER, num_local_experts=EXPERTS)
    ),
    # its weights are (in, out)
    "gpt_oss": lambda: make(
        GptOssForCausalLM,
        GptOssConfig(
            **_GROUPED,
            intermediate_size=INNER,
            num_local_experts=EXPERTS,
            num_experts_per_tok=2,
            head_dim=8,
            layer_types=["full_attention"] * 2,
        ),
    ),
}
ROUTERS = {"qwen3_moe": "gate.weight", "mixtral": "gate.weight", "gpt_oss": "router.weight"}
of_every_base = pytest.mark.parametrize("kind", BASES)


def _config(**fields: Any) -> UniProjConfig:
    given = {"d": 60, "r": 2, "target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}
    return UniProjConfig(**{**given, "task_type": "CAUSAL_LM", **fields})


def _adapted(kind: str, **fields: Any) -> PeftModel:
    """With an update that shows."""
    model = get_peft_model(BASES[kind](), _config(**fields)).eval()
    with torch.no_grad():
        theta_d = adapter_of(model).theta_d
        theta_d.add_(torch.randn(len(theta_d), generator=torch.Generator().manual_seed(0)), alpha=0.1)
    return model


def _updates(kind: str, model: PeftModel, adapter_name: str = "default", theta_d: Tensor | None = None) -> dict:
    """{Parameter of the base: B A}, expert by expert from the blocks of the layout."""
    P, own = adapter_of(model, adapter_name)
    theta_D, delta, found = P(own.detach() if theta_d is None else theta_d), {}, {}
    for blocks in P.layout.pairs():
        B, A = (theta_D[block.rows].view(block.shape) for block in blocks)
        delta[blocks[0].module] = B @ A
    for name, parameter in BASES[kind]().named_parameters():
        if f"{name}.0" in delta:
            found[name] = torch.stack([delta[f"{name}.{i}"] for i in range(len(parameter))])
            found[name] = found[name].mT if kind == "gpt_oss" else found[name]
        elif (module := name if name in delta else name.removesuffix(".weight")) in delta:
            found[name] = delta[module]
    return found


def _with(kind: str, updates: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss and logits of the base with updates added to its Parameters."""
    base = BASES[kind]()
    weights = dict(base.named_parameters())
    weights |= {name: weights[name].detach() + delta for name, delta in updates.items()}
    found = functional_call(base, weights, kwargs=batch("llama"))
    return found.loss, found.logits


def _close(found: Tensor, wanted: Tensor, rtol: float = 1e-3) -> None:
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-5 * float(wanted.detach().abs().max()))


# ---- what is computed --------------------------------------------------------------------------------


@of_every_base
@pytest.mark.parametrize("projection", ["unilora", "lora_xs", "tinylora", "vblora"])
def test_every_expert_has_the_update_of_its_own_blocks(kind: str, projection: str) -> None:
    model = _adapted(kind, projection=projection, d=60 if projection == "unilora" else None)
    theta_d = adapter_of(model).theta_d
    found = model(**batch("llama"))
    found.loss.backward()
    own = theta_d.detach().clone().requires_grad_()
    loss, expected = _with(kind, _updates(kind, model, theta_d=own))
    _close(found.logits, expected)
    assert (expected - logits(BASES[kind]())).abs().max() > 1e-3
    loss.backward()
    _close(theta_d.grad, own.grad, rtol=1e-2)


@of_every_base
def test_plain_lora_with_the_same_factors_has_the_same_logits_and_gradients(kind: str) -> None:
    model = _adapted(kind)
    P, theta_d = adapter_of(model)
    fields = {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}
    theirs = get_peft_model(BASES[kind](), LoraConfig(r=2, lora_alpha=2, **fields)).eval()
    ours = dict(model.named_modules())
    for name, layer in theirs.named_modules():
        if hasattr(layer, "lora_A"):
            for factor in ("lora_A", "lora_B"):
                drawn = getattr(layer, factor)["default"]
                drawn.weight.data = getattr(ours[name], factor)["default"].weight.detach().clone()
    found, expected = model(**batch("llama")), theirs(**batch("llama"))
    _close(found.logits, expected.logits)
    found.loss.backward(), expected.loss.backward()
    theta_D = torch.zeros(P.shape[0])
    for name, layer in theirs.base_model.model.named_modules():
        for factor in ("A", "B") if hasattr(layer, "lora_A") else ():
            gradient = getattr(layer, f"lora_{factor}")["default"].weight.grad
            whole = name.replace(".base_layer", "")
            parts = {whole: gradient}
            if hasattr(layer, "parameter_name"):  # A is (experts r, in), B (out, r experts)
                apart = gradient.unflatten(0, (EXPERTS, -1)) if factor == "A" else gradient.unflatten(1, (-1, EXPERTS))
                apart = apart if factor == "A" else apart.permute(2, 0, 1)
                parts = {f"{whole}.{layer.parameter_name}.{i}": part for i, part in enumerate(apart)}
            for module, part in parts.items():
                theta_D[P.layout.block(module, factor).rows] = part.flatten()
    _close(theta_d.grad, P.adjoint(theta_D), rtol=1e-2)


def test_an_expert_is_a_module_to_the_layout_and_to_locality() -> None:
    layout = adapter_of(_adapted("qwen3_moe"))[0].layout
    of_a_layer = (2 * INNER + HIDDEN) * EXPERTS + (HIDDEN + INNER) * EXPERTS + 2 * HIDDEN
    assert 2 * of_a_layer * 2 == layout.D
    down = [f"model.layers.1.mlp.experts.down_proj.{i}" for i in range(EXPERTS)]
    assert [layout.shapes()[module] for module in down] == [(HIDDEN, INNER)] * EXPERTS
    used: dict[str, list[set[int]]] = {}
    per_module = {"projection_kwargs": {"per": "module"}}
    for projection, fields in (("unilora", {}), ("unilora_local", per_module)):
        P = adapter_of(_adapted("qwen3_moe", projection=projection, d=90, **fields))[0]
        dense = P.to_dense()
        used[projection] = [set(dense[P.layout.rows([m])].nonzero()[:, 1].tolist()) for m in P.layout.modules]
    for i, own in enumerate(used["unilora_local"]):
        assert own.isdisjoint(set().union(*used["unilora_local"][:i]))
    assert any(not a.isdisjoint(b) for a, b in zip(used["unilora"], used["unilora"][1:], strict=False))


@of_every_base
def test_the_singular_vectors_are_those_of_each_expert(kind: str) -> None:
    model = _adapted(kind, projection="lora_xs", d=None, r=3)
    P, theta_d = adapter_of(model)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with torch.no_grad():
        theta_D = P(theta_d)
    for i, W in enumerate(BASES[kind]().get_parameter(name).detach().double()):
        W = W.T if kind == "gpt_oss" else W
        delta = (lambda b, a: theta_D[b.rows].view(b.shape) @ theta_D[a.rows].view(a.shape))(
            P.layout.block(f"{name}.{i}", "B"), P.layout.block(f"{name}.{i}", "A")
        ).double()
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        U, V = U[:, :3], Vh[:3].T
        _close(U @ (U.T @ delta @ V) @ V.T, delta)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_a_parameter_of_two_axes_is_one_module(kind: str) -> None:
    model = _adapted(kind, target_modules=[], target_parameters=[ROUTERS[kind]])
    _, expected = _with(kind, _updates(kind, model))
    _close(logits(model), expected)
    assert not torch.equal(logits(model), logits(BASES[kind]()))
    _close(logits(model.merge_and_unload()), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_gradient_checkpointing_changes_no_gradient(kind: str, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = _adapted(kind).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**batch("llama"), use_cache=False).loss.backward()
        gradients.append(adapter_of(model).theta_d.grad)
    _close(gradients[1], gradients[0])


def test_ranks_and_alphas_apply_to_parameters_by_name() -> None:
    patterns = {"rank_pattern": {r"layers\.0\..*down_proj": 3, "gate_up_proj": 1}, "alpha_pattern": {"down_proj": 6}}
    model = _adapted("qwen3_moe", **patterns)
    P = adapter_of(model)[0]
    ranks = {site.name.removeprefix("model.layers."): site.r for site in P.layout.sites}
    assert ranks == {
        "0.mlp.experts.down_proj": 3,
        "0.mlp.experts.gate_up_proj": 1,
        "0.self_attn.q_proj": 2,
        "1.mlp.experts.down_proj": 2,
        "1.mlp.experts.gate_up_proj": 1,
        "1.self_attn.q_proj": 2,
    }
    updates = _updates("qwen3_moe", model)
    for name in updates:  # alpha / r
        updates[name] *= {"down": 6 / ranks.get(name.removeprefix("model.layers."), 2), "gate_up": 2}.get(
            name.rpartition(".")[2].removesuffix("_proj"), 1
        )
    _close(logits(model), _with("qwen3_moe", updates)[1])


def test_the_factors_of_experts_alone_take_the_dtype_of_their_weights() -> None:
    base = BASES["qwen3_moe"]().bfloat16()
    model = get_peft_model(base, _config(target_modules=[]), autocast_adapter_dtype=False)
    factor = model.base_model.model.model.layers[0].mlp.experts.lora_A["default"]
    assert factor.weight.dtype == torch.bfloat16 and adapter_of(model).theta_d.dtype == torch.float32
    train_steps(model, "llama", 1)


# ---- life --------------------------------------------------------------------------------------------


@of_every_base
def test_merging_adds_each_update_to_its_expert(kind: str) -> None:
    model = _adapted(kind)
    updates = _updates(kind, model)
    before, weights = logits(model), dict(BASES[kind]().named_parameters())
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        _close(logits(model), before)
        model.unmerge_adapter()
        _close(logits(model), before)
    merged = model.merge_and_unload(safe_merge=True)
    assert dict(merged.named_parameters()).keys() == weights.keys()
    for name, parameter in merged.named_parameters():
        _close(parameter, weights[name] + updates.get(name, 0.0))


@of_every_base
def test_two_adapters_live_on_the_same_experts(kind: str) -> None:
    model = _adapted(kind)
    first = logits(model)
    model.add_adapter("other", _config(projection_seed=1, init_seed=2, lora_alpha=8))
    updates = _updates(kind, model, "default"), {n: 4 * u for n, u in _updates(kind, model, "other").items()}
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    second = logits(model)
    _close(second, _with(kind, updates[1])[1])
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(BASES[kind]()))
    model.base_model.set_adapter(["default", "other"])
    _close(logits(model), _with(kind, {n: u + updates[1][n] for n, u in updates[0].items()})[1])
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(logits(model), second) and [*model.base_model.projections] == ["other"]
    assert not any("default" in layer.r for layer in model.modules() if hasattr(layer, "parameter_name"))


EQUAL = """
import sys, torch, uniproj
torch.set_num_threads(1)
from peft import PeftModel
from tests.tuner.models import logits
from tests.tuner.test_experts import BASES
for kind in BASES:
    model = PeftModel.from_pretrained(BASES[kind](), f"{sys.argv[1]}/{kind}").eval()
    assert torch.equal(logits(model), torch.load(f"{sys.argv[1]}/{kind}.pt")), kind
print("equal")
"""


@of_every_base
def test_a_saved_adapter_loads_bit_equal(kind: str, tmp_path: Path) -> None:
    model = _adapted(kind)
    train_steps(model, "llama", 1)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        again = PeftModel.from_pretrained(BASES[kind](), tmp_path, **options).eval()
        assert torch.equal(logits(again), expected)
    beside = _adapted(kind, init_seed=5)
    beside.load_adapter(tmp_path, "loaded")
    beside.set_adapter("loaded")
    assert torch.equal(logits(beside.eval()), expected)
    assert verify(tmp_path, BASES[kind]())


class _Taken(dict):
    """Where every address is that of a module of before, which had these weights."""

    def __init__(self, weights: nn.Module):
        super().__init__()
        self._weights = weights

    def get(self, key: tuple[int, str], default: Any = None) -> Any:
        return getattr(self._weights, key[1]).detach()


def test_a_probe_takes_no_weight_of_a_module_that_lay_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    base = BASES["qwen3_moe"]()
    layer = next(m for m in _adapted("qwen3_moe").modules() if isinstance(m, ParamWrapper))
    x = torch.randn(3, base.config.hidden_size)
    routes = torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
    monkeypatch.setattr(parametrize, "_cache", taken := _Taken(base.model.layers[0].mlp.experts))
    assert _is_alive(layer, "default", (x, *routes), {})
    assert parametrize._cache is taken


@pytest.mark.system
def test_a_saved_adapter_loads_bit_equal_in_a_fresh_process(tmp_path: Path) -> None:
    for kind in BASES:
        model = _adapted(kind)
        model.save_pretrained(tmp_path / kind)
        torch.save(logits(model), tmp_path / f"{kind}.pt")
    run = subprocess.run([sys.executable, "-c", EQUAL, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert run.stdout.strip() == "equal", run.stderr


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_a_sharded_base_gives_the_gradient_of_a_whole_one(kind: str) -> None:
    whole, sharded = _adapted(kind).train(), _adapted(kind).train()
    shard_base(sharded)
    assert isinstance(sharded.base_model.model.model.layers[0].mlp.experts.get_param(), DTensor)
    for model in (whole, sharded):
        model(**batch("llama")).loss.backward()
    _close(adapter_of(sharded).theta_d.grad, adapter_of(whole).theta_d.grad)


class _Around(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.language = inner

    def forward(self, **inputs: Any) -> Any:
        return self.language(**inputs)


def test_renamed_experts_stay_parameters(tmp_path: Path) -> None:
    # a rank that times the experts is that of the configuration
    model = _adapted("qwen3_moe", r=4, rank_pattern={"gate_up_proj": 1}, alpha_pattern={"down_proj": 6}, task_type=None)
    model.save_pretrained(tmp_path / "old")
    expected = logits(model)
    around = _Around(BASES["qwen3_moe"]())
    renamed = PeftModel.from_pretrained(around, tmp_path / "old", remap={"model": "language.model"}).eval()
    assert torch.equal(logits(renamed), expected)
    wanted = [f"language.model.layers.{i}.mlp.experts.{n}_proj" for i in range(2) for n in ("down", "gate_up")]
    assert sorted(renamed.peft_config["default"].target_parameters) == wanted
    renamed.save_pretrained(tmp_path / "new")
    again = PeftModel.from_pretrained(_Around(BASES["qwen3_moe"]()), tmp_path / "new").eval()
    assert torch.equal(logits(again), expected)


# ---- what is refused ---------------------------------------------------------------------------------

FOUND = r"target_parameters=\['experts\.gate_up_proj', 'experts\.down_proj'\]"


@of_every_base
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_proj", "down_proj"]}, f"got 'down_proj', which is none.*{FOUND}"),
        ({"target_modules": ["w1"], "target_parameters": None}, f"adapted layer, got 'w1', which is none.*{FOUND}"),
        (
            {"target_parameters": ["gate_up_proj", "up_proj"]},
            f"adapted parameter, got 'up_proj', which is none.*{FOUND}",
        ),
        ({"target_modules": ["lm_head"], "target_parameters": ["nope"]}, "got 'nope'"),
        ({"lora_dropout": 0.1}, "does not work with lora_dropout"),
        ({"target_parameters": ["norm.weight"]}, "only 2d and 3d are supported"),
    ],
)
def test_a_refusal_leaves_the_model_as_it_was(kind: str, fields: dict[str, Any], message: str) -> None:
    base = BASES[kind]()
    names, before = [name for name, _ in base.named_modules()], logits(base)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, _config(**fields))
    assert [name for name, _ in base.named_modules()] == names and torch.equal(logits(base), before)


def test_a_second_adapter_of_other_parameters_leaves_the_first_as_it_was() -> None:
    model = _adapted("qwen3_moe")
    before = logits(model)
    with pytest.raises(ValueError, match="must target the same set of parameters"):
        model.add_adapter("other", _config(target_parameters=["down_proj"]))
    assert torch.equal(logits(model), before) and [*model.peft_config] == ["default"]
    model.add_adapter("other", _config(target_parameters=None))
    model.set_adapter("other")
    alone = get_peft_model(BASES["qwen3_moe"](), _config(target_parameters=None)).eval()
    assert torch.equal(logits(model), logits(alone))


def test_a_mixed_batch_of_experts_is_refused_with_the_remedy() -> None:
    model = _adapted("qwen3_moe")
    thetas = torch.stack([adapter_of(model).theta_d.detach()] * 2)
    with (
        pytest.raises(AdapterError, match=r"experts\.\w+ must tell the rows of a batch apart.*target_parameters"),
        mixed(model, thetas, [0, 1, 0]),
    ):
        logits(model)


# ---- size --------------------------------------------------------------------------------------------


def test_many_large_experts_are_adapted_without_their_weights(tmp_path: Path) -> None:
    layers, experts, hidden, inner, r, d = 48, 128, 2048, 768, 2, 1024
    sizes = {"hidden_size": hidden, "moe_intermediate_size": inner, "num_attention_heads": 32, "head_dim": 128}
    with torch.device("meta"):
        base = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_hidden_layers=layers, num_experts=experts))
    tracemalloc.start()
    try:
        model = get_peft_model(base, _config(d=d, r=r, target_modules=[]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    P = adapter_of(model)[0]
    assert layers * experts * r * (2 * inner + hidden + hidden + inner) == P.shape[0]
    assert peak < P.shape[0]  # bytes: a quarter of theta_D
    assert not list(P.state_dict()) and not list(P.buffers())
    assert [name for name, p in model.named_parameters() if not p.is_meta] == ["base_model.uniproj_theta_d.default"]
    # theta_D is on the CPU, and what PEFT computes of it where the experts are
    layer = model.base_model.model.model.layers[-1].mlp.experts
    assert all(factor.is_meta for factor in layer.get_delta_factors("default")[:2])
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size <= 4096 + 4 * d
