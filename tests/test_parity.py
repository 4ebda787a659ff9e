"""The same weights give the same update in PEFT and here, forward, backward and on the way back."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from tests.reference.peft_toys import (
    CONFIGS,
    TARGETS,
    Toy,
    deltas,
    error,
    factors,
    layers,
    peft_delta,
    run_base,
    trainables,
    wrap,
)
from uniproj import AdapterError, LoRALayout, Projection, ProjectionError, build
from uniproj.claims import CHECKS
from uniproj.exchange import from_peft, to_peft

KINDS = sorted(CONFIGS)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_case = pytest.mark.parametrize(
    ("kind", "seed", "dtype"), [(k, s, t) for k in KINDS for s, t in enumerate(TOLERANCE)], ids=str
)


@each_case
@torch.no_grad()
def test_theta_D_and_delta_W_are_pefts(kind: str, seed: int, dtype: torch.dtype) -> None:
    _, model = wrap(kind, seed, dtype)
    P, theta_d = from_peft(model, dtype=dtype)
    theta_D, found = P(theta_d), layers(model)
    assert theta_d.dtype == theta_D.dtype == dtype
    assert sorted(P.layout.modules) == sorted(found) == sorted(TARGETS)
    for block, ours in zip(P.layout.blocks, P.layout.split(theta_D), strict=True):
        B, A = factors(found[block.module], kind)
        assert error(ours, B if block.factor == "B" else A) <= TOLERANCE[dtype]
    for name, ours in deltas(P.layout, theta_D, model).items():
        assert error(ours, peft_delta(found[name])) <= TOLERANCE[dtype]


@each_case
def test_output_and_gradient_are_pefts(kind: str, seed: int, dtype: torch.dtype) -> None:
    base, model = wrap(kind, seed, dtype)
    P, theta_d = from_peft(model, dtype=dtype)
    x, target = torch.randn(7, 24, dtype=dtype), torch.randn(7, 24, dtype=dtype)

    theta_D = P(theta_d.requires_grad_())
    theta_D.retain_grad()
    y = run_base(base, deltas(P.layout, theta_D, model), x)
    assert error(model(x), y) <= TOLERANCE[dtype]
    (y - target).square().mean().backward()
    (model(x) - target).square().mean().backward()

    # numbers are copied, never changed, so the same copy puts PEFT's gradients in our order
    of_gradients = copy.deepcopy(model)
    for mine, theirs in zip(trainables(of_gradients), trainables(model), strict=True):
        assert theirs.grad is not None
        mine.data = theirs.grad.clone()
    wanted, gradient = from_peft(of_gradients, dtype=dtype)
    assert theta_D.grad is not None and theta_d.grad is not None
    assert error(P.adjoint(theta_D.grad), gradient) <= TOLERANCE[dtype]
    assert error(theta_d.grad, gradient) <= TOLERANCE[dtype]
    for ours, theirs in zip(P.parameters(), wanted.parameters(), strict=True):
        assert ours.grad is not None and error(ours.grad, theirs) <= TOLERANCE[dtype]


@each_case
@torch.no_grad()
def test_way_back(kind: str, seed: int, dtype: torch.dtype) -> None:
    _, model = wrap(kind, seed, dtype)
    P, theta_d = from_peft(model, dtype=dtype)
    theta_d += torch.randn_like(theta_d)
    for p in P.parameters():
        p.add_(torch.randn_like(p))
    to_peft(P, theta_d, model)
    for name, ours in deltas(P.layout, P(theta_d), model).items():
        assert error(peft_delta(layers(model)[name]), ours) <= TOLERANCE[dtype]
    _assert_equal(from_peft(model, dtype=dtype), (P, theta_d))


@each_kind
@torch.no_grad()
def test_frozen_tensors_move_to_a_model_with_other_ones(kind: str) -> None:
    saved: dict[str, dict[str, Any]] = {
        "UNILORA": {"save_indices": True, "proj_seed": 9},
        "VERA": {"projection_prng_key": 9},
    }
    P, theta_d = from_peft(wrap(kind, 0)[1])
    other = wrap(kind, 5, **saved.get(kind, {}))[1]
    to_peft(P, theta_d, other)
    for name, ours in deltas(P.layout, P(theta_d), other).items():
        assert error(peft_delta(layers(other)[name]), ours) <= 1e-10
    _assert_equal(from_peft(other), (P, theta_d))


@each_kind
def test_a_written_adapter_survives_pefts_checkpoint(kind: str, tmp_path: Path) -> None:
    options = {"save_indices": True} if kind == "UNILORA" else {}
    P, theta_d = from_peft(wrap(kind, 0, torch.float32)[1], dtype=torch.float32)
    base, model = wrap(kind, 5, torch.float32, **options)
    to_peft(P, theta_d, model)
    model.save_pretrained(tmp_path)
    _assert_equal(from_peft(PeftModel.from_pretrained(base, tmp_path), dtype=torch.float32), (P, theta_d))


@torch.no_grad()
def test_half_precision_base_keeps_pefts_rounded_scales() -> None:
    _, model = wrap("UNILORA", dtype=torch.bfloat16)
    P, theta_d = from_peft(model, dtype=torch.bfloat16)
    layer, rounded = layers(model)["up"], CHECKS["isometric"](P).value
    wanted = layer.unilora_theta_d["default"].double()[layer.unilora_indices_A["default"]]
    ours = P.layout.split(P(theta_d.double()))[P.layout.blocks.index(P.layout.block("up", "A"))]
    assert torch.equal(ours, wanted * layer.unilora_scales_A["default"].double())
    assert 1e-4 < rounded < 1e-2


def _assert_equal(found: tuple[Projection, Tensor], wanted: tuple[Projection, Tensor]) -> None:
    assert torch.equal(found[1], wanted[1])
    mine, theirs = found[0].state_dict(keep_vars=True), wanted[0].state_dict(keep_vars=True)
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)
    assert torch.equal(found[0].to_dense(), wanted[0].to_dense())
    assert all(torch.equal(found[0].constants()[k], b) for k, b in wanted[0].constants().items())


@each_kind
def test_nothing_is_shared_with_the_model(kind: str) -> None:
    _, model = wrap(kind)
    P, theta_d = from_peft(model)
    before = P(theta_d).detach().clone()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert torch.equal(P(theta_d), before)


@each_kind
def test_claims_of_a_converted_projection_hold(kind: str) -> None:
    P, _ = from_peft(wrap(kind)[1])
    assert all(CHECKS[claim](P).holds for claim in P.claims)


def test_unilora_columns_are_unit_vectors_to_pefts_precision() -> None:
    P, _ = from_peft(wrap("UNILORA")[1])
    gap = CHECKS["isometric"](P).value
    assert P.claims == {"linear", "orthogonal", "uniform", "global_sharing"} and 1e-10 < gap < 1e-6
    assert torch.equal(P.rebuild().index, P.index)


@pytest.mark.parametrize(("r", "d", "proj_seed"), [(4, 50, 42), (1, 256, 0), (3, 7, 123), (2, 512, 2**31)])
def test_unilora_indices_are_pefts(r: int, d: int, proj_seed: int) -> None:
    _, model = wrap("UNILORA", r=r, theta_d_length=d, proj_seed=proj_seed)
    found = layers(model)
    layout = LoRALayout.from_shapes({n: (m.out_features, m.in_features) for n, m in found.items()}, r)
    P = build("unilora", d=d, layout=layout, seed=proj_seed, assignment="peft", module_order=list(found))
    for block, index in zip(layout.blocks, layout.split(P.index), strict=True):
        theirs = getattr(found[block.module], f"unilora_indices_{block.factor}")["default"]
        assert torch.equal(index.long(), theirs)


@pytest.mark.parametrize(("d", "r"), [(50, 4), (7, 1), (300, 2)])
def test_unilora_loads_are_balanced(d: int, r: int) -> None:
    _, model = wrap("UNILORA", theta_d_length=d, r=r)
    rows = [getattr(m, f"unilora_indices_{f}")["default"].flatten() for m in layers(model).values() for f in "AB"]
    n = torch.bincount(torch.cat(rows), minlength=d)
    assert set(n.tolist()) <= {n.sum().item() // d, -(-n.sum().item() // d)}


def test_starts_are_pefts() -> None:
    torch.manual_seed(0)
    for kind, name in (("LORA", "lora"), ("VERA", "vera"), ("TINYLORA", "tinylora")):
        cls, options = CONFIGS[kind]
        P, theta_d = from_peft(get_peft_model(Toy(), cls(**options, target_modules=TARGETS)))
        ours = P.init_theta()
        zero = theta_d == 0
        assert P.name == name and torch.equal(ours == 0, zero)
        if kind == "VERA":
            assert torch.allclose(theta_d[~zero], torch.full((20,), 0.1, dtype=torch.float64))
            assert torch.equal(theta_d[~zero].float(), ours[~zero])
        if kind == "LORA":
            for block in P.layout.blocks:
                if block.factor == "A":
                    bound = block.shape[1] ** -0.5
                    assert theta_d[block.rows].abs().max() <= bound and ours[block.rows].abs().max() <= bound


@torch.no_grad()
def test_second_adapter_and_ablations() -> None:
    _, model = wrap("UNILORA", save_indices=True)
    model.add_adapter("other", model.peft_config["default"])
    model.double()
    first = {name: peft_delta(layer) for name, layer in layers(model).items()}
    P, _ = from_peft(model, "other")
    for name in ("unilora", "unilora_local", "unilora_nonuniform", "unilora_unnormalised"):
        ours = build(name, d=50, layout=P.layout, seed=3)
        theta_d = ours.init_theta().double()
        to_peft(ours, theta_d, model, "other")
        found, _ = from_peft(model, "other")
        assert torch.equal(found(theta_d), ours(theta_d))
        assert "linear" in found.claims and all(CHECKS[claim](found).holds for claim in found.claims)
    assert all(torch.equal(peft_delta(layer), first[name]) for name, layer in layers(model).items())


# ---- refusals: each names what differs, and leaves the model as it was ---------------------------------


def _refused(match: str, model: PeftModel, P: Projection, theta_d: Tensor, **options: Any) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(AdapterError, match=match):
        to_peft(P, theta_d, model, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        ("LORA", {"r": 2}, r"to_peft: down must have .* = \(16, 40, 4\), got .* = \(16, 40, 2\).*D = 984"),
        ("LORA", {"target_modules": TARGETS[:2]}, r"mix must have .* = \(24, 16, 3\), got no adapter"),
        ("UNILORA", {"theta_d_length": 40}, r"unilora_theta_d must have the projection's shape \(50,\), got \(40,\)"),
        ("UNILORA", {"proj_seed": 1}, r"down\.unilora_indices_B must already equal.*save_indices=True"),
        ("VERA", {"projection_prng_key": 1, "save_projection": False}, "vera_B must already equal.*save_projection"),
        ("VBLORA", {"num_vectors": 6}, r"vblora_vector_bank must have the projection's shape \(7, 8\), got \(6, 8\)"),
        ("VBLORA", {"topk": 3}, "topk must already equal the projection's"),
        ("TINYLORA", {"u": 4}, r"down\.tinylora_v must have the projection's shape \(5,\), got \(4,\)"),
        ("TINYLORA", {"weight_tying": 1.0}, r"mix must share its numbers.*group 1,.*got PEFT's group 0"),
        ("TINYLORA", {"weight_tying": 0.0}, r"pair\.0 must share its numbers.*group 1,.*got PEFT's group 3"),
        ("TINYLORA", {"projection_seed": 1, "save_projection": False}, r"tinylora_P must already equal"),
    ],
)
def test_to_peft_refuses_what_differs(kind: str, changes: dict[str, Any], match: str) -> None:
    P, theta_d = from_peft(wrap(kind)[1])
    _refused(match, wrap(kind, 1, **changes)[1], P, theta_d)


def test_to_peft_refuses_other_methods_states_and_shapes() -> None:
    P, theta_d = from_peft(wrap("LORA")[1])
    _refused("of PEFT type VERA must get a VeRA projection, got 'lora'", wrap("VERA")[1], P, theta_d)
    _, model = wrap("LORA")
    _refused(r"theta_d must have shape \(d,\) = \(984,\), got \(2, 984\)", model, P, torch.stack([theta_d] * 2))
    _refused(r"must have an adapter 'x', got \['default'\]", model, P, theta_d, adapter_name="x")
    model.merge_adapter()
    _refused("up must not have 'default' merged, got 5", model, P, theta_d)


def test_to_peft_refuses_vera_matrices_that_another_adapter_uses() -> None:
    P, theta_d = from_peft(wrap("VERA", projection_prng_key=1)[1])
    _, model = wrap("VERA")
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    _refused(r"vera_B must already equal.*\['default', 'other'\] share it", model.double(), P, theta_d)


def test_from_peft_refuses_what_is_not_one_of_the_five_methods() -> None:
    with pytest.raises(AdapterError, match=r"must be of a PEFT type among LORA, .*, got IA3"):
        from_peft(get_peft_model(Toy(), IA3Config(target_modules=["up"], feedforward_modules=[])))
    with pytest.raises(AdapterError, match=r"must have an adapter 'default', got \[\]"):
        from_peft(Toy())
    with pytest.raises(AdapterError, match=r"up must be a layer whose update is s B A.*got Dora"):
        from_peft(get_peft_model(Toy(), LoraConfig(target_modules=["up"], use_dora=True)))
    with pytest.raises(AdapterError, match=r"up must be a layer whose update is s B A.*got lora_bias=True"):
        from_peft(get_peft_model(Toy(), LoraConfig(target_modules=["up"], lora_bias=True)))


def test_from_peft_refuses_uniloras_that_are_no_scaled_partition() -> None:
    _, model = wrap("UNILORA")
    model.base_model.model.mix.unilora_scales_A["default"][1, 2] *= 2
    with pytest.raises(AdapterError, match=r"mix must scale coordinate .* as every other row does"):
        from_peft(model)
    with pytest.raises(ProjectionError, match="d must lie in"):
        from_peft(wrap("UNILORA", theta_d_length=2000)[1])
