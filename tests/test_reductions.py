"""Methods without a PEFT peer, against a peer they reduce to or against their formula written out."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch
from torch import Tensor

from tests.reference.peft_toys import deltas, error, layers, peft_delta, wrap
from uniproj import LoRALayout, build
from uniproj.exchange import from_peft, to_peft
from uniproj.projections.fastfood import Fastfood
from uniproj.projections.lora_xs import LoRAXS
from uniproj.projections.nola import NOLA
from uniproj.projections.tied_lora import TiedLoRA
from uniproj.projections.tinylora import TinyLoRA

SEEDS = pytest.mark.parametrize("seed", range(2))
SHAPES = {"h.1.q": (12, 9), "h.0.q": (12, 9), "h.0.v": (10, 14)}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def _weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}


def _updates(layout: LoRALayout, theta_D: Tensor) -> dict[str, Tensor]:
    matrices = dict(zip(((b.module, b.factor) for b in layout.blocks), layout.split(theta_D), strict=True))
    return {m: matrices[m, "B"] @ matrices[m, "A"] for m in layout.modules}


def _unit_matrices(r: int) -> Tensor:
    """(r^2, r, r): with u = r^2 numbers per module, sum_i v_i P_i is the matrix with entries v."""
    return torch.eye(r * r, dtype=torch.float64).view(r * r, r, r)


@SEEDS
@pytest.mark.parametrize("side", ["A", "B"])
def test_lora_xs_is_tinylora_with_unit_matrices(seed: int, side: str) -> None:
    r, weights = 3, _weights(seed)
    layout = LoRALayout.from_shapes(SHAPES, r)
    tiny = TinyLoRA(layout, weights, seed, u=r * r, side="B")
    xs = LoRAXS(layout, weights, seed, side=side)
    R_tiny = torch.randn(len(SHAPES), r, r, dtype=torch.float64)
    R_xs = torch.empty_like(R_tiny)
    tiny.drawn = _unit_matrices(r).flatten().repeat(len(SHAPES))
    for i, module in enumerate(layout.modules):
        root = torch.linalg.svdvals(weights[module])[:r].sqrt()
        R_xs[i] = root.unsqueeze(1) * R_tiny[i] / root
    ours = _updates(layout, xs(R_xs.flatten()))
    for module, expected in _updates(layout, tiny(R_tiny.flatten())).items():
        assert error(ours[module], expected) < 1e-12


@SEEDS
@torch.no_grad()
def test_lora_xs_is_pefts_tinylora_with_unit_matrices(seed: int) -> None:
    r = 2
    base, model = wrap("TINYLORA", seed, r=r, u=r * r, weight_tying=0.0)
    found = layers(model)
    weights: dict[str, Tensor] = {}
    for name, layer in found.items():
        layer.tinylora_P["default"].copy_(_unit_matrices(r))
        W = base.get_parameter(f"{name}.weight")
        weights[name] = W.T if layer.fan_in_fan_out else W
    layout = LoRALayout.from_shapes({n: (W.shape[0], W.shape[1]) for n, W in weights.items()}, r)
    xs = LoRAXS(layout, weights)
    R, gaps = [], {}
    for i, name in enumerate(layout.modules):
        S = torch.linalg.svdvals(weights[name])[: r + 1]
        root, gaps[name] = S[:r].sqrt(), float(S.diff().abs().min() / S[0])
        # singular vectors are defined up to a sign, and PEFT keeps the one its library returns
        sign = torch.sign((xs.frozen("B")[i] * found[name].tinylora_B["default"]).sum(0))
        R.append((sign * root).unsqueeze(1) * found[name]._compute_R("default") * sign / root)
    ours = deltas(layout, xs(torch.stack(R).flatten()), model)
    for name, layer in found.items():
        # PEFT decomposes in float32, which turns singular vectors by the rounding error over the gap
        assert error(ours[name], peft_delta(layer)) < 8 * torch.finfo(torch.float32).eps / gaps[name]


@SEEDS
def test_tied_scalers_on_shared_matrices_are_pefts_vera(seed: int) -> None:
    _, model = wrap("VERA", seed)
    vera, theta_d = from_peft(model)
    tied = TiedLoRA(vera.layout, seed, trained="uv", group="all")
    tied.B.copy_(vera.B)
    tied.A.copy_(vera.A)
    assert torch.equal(tied(theta_d), vera(theta_d))
    for name, ours in deltas(tied.layout, tied(theta_d), model).items():
        assert error(ours, peft_delta(layers(model)[name])) < 1e-12


@pytest.mark.parametrize("group", ["type", "all"])
def test_tied_matrices_of_one_module_are_lora(group: str) -> None:
    layout = LoRALayout.from_shapes({"q": (12, 9)}, 3)
    tied = TiedLoRA(layout, trained="AB", group=group)
    theta_d = torch.randn(layout.D, dtype=torch.float64)
    assert torch.equal(tied(theta_d), build("lora", layout=layout)(theta_d))
    assert torch.equal(tied.to_dense(), torch.eye(layout.D, dtype=torch.float64))


def test_tied_matrices_of_equal_modules_repeat_one_lora() -> None:
    one = LoRALayout.from_shapes({"q": (12, 9)}, 3)
    layout = LoRALayout.from_shapes({f"h.{i}.q": (12, 9) for i in range(4)}, 3)
    theta_d = torch.randn(one.D, dtype=torch.float64)
    tied = TiedLoRA(layout, trained="AB")
    assert torch.equal(tied(theta_d), theta_d.repeat(4))
    P = tied.to_dense()
    assert torch.equal(P.T @ P, 4 * torch.eye(one.D, dtype=torch.float64))


@pytest.mark.parametrize("name", ["fastfood", "fastfood_sign"])
@pytest.mark.parametrize(("D", "d"), [(64, 16), (64, 64), (100, 16), (50, 13), (7, 1), (33, 32)])
def test_fastfood_is_its_formula(name: str, D: int, d: int) -> None:
    P = build(name, D, d, seed=D + d)
    assert isinstance(P, Fastfood)
    n = P.n
    H = torch.from_numpy(scipy.linalg.hadamard(n)).double()
    assert n // 2 < d <= n and torch.equal(H @ H.T, n * torch.eye(n, dtype=torch.float64))
    theta_d = torch.randn(d, dtype=torch.float64)
    padded = torch.cat([theta_d, torch.zeros(n - d, dtype=torch.float64)])
    rows = []
    for signs, G, Pi in zip(P.B.double(), P.G.double(), P.Pi, strict=True):
        mixed = torch.stack([signs[j] * padded[j] for j in range(n)])
        mixed = H @ mixed
        mixed = torch.stack([G[i] * mixed[Pi[i]] for i in range(n)])
        rows.append(H @ mixed / (n**0.5 * G.norm()))
    expected = torch.cat(rows)[:D] / (D / n) ** 0.5
    assert error(P(theta_d), expected) < 1e-12
    assert error(P.to_dense() @ theta_d, expected) < 1e-12


def test_fastfood_of_one_block_has_the_spectrum_of_its_diagonal() -> None:
    """d = n' = D: P = H G Pi H B / n' with H / sqrt(n') orthogonal, so the singular values of P are |G_i|."""
    P = build("fastfood", 64, 64, seed=1)
    assert isinstance(P, Fastfood)
    found = torch.linalg.svdvals(P.to_dense())
    assert torch.allclose(found, P.G.double().abs().flatten().sort(descending=True).values, atol=1e-12)


@SEEDS
def test_nola_factors_are_mixtures_of_k_random_matrices(seed: int) -> None:
    layout = LoRALayout.from_shapes(SHAPES, 3)
    P = NOLA(layout, d=33, seed=seed)
    theta_d, c = torch.randn(33, dtype=torch.float64), layout.split(P.offset)
    assert sum(P.k) == 33 and set(P.k) == {5, 6}
    taken = 0
    for i, (ours, block) in enumerate(zip(layout.split(P(theta_d)), layout.blocks, strict=True)):
        basis = P.constants()[f"P_{i}"].double()
        assert basis.abs().max() < P.k[i] ** -0.5
        expected = c[i].clone()
        for j in range(P.k[i]):
            expected += theta_d[taken + j] * basis[:, j].reshape(block.shape)
        taken += P.k[i]
        assert error(ours, expected) < 1e-12
        assert block.factor == "A" or not c[i].any()


def test_nola_basis_has_variance_one_third_over_k() -> None:
    P = NOLA(LoRALayout.from_shapes({"q": (512, 512)}, 4), d=40)
    for i in range(2):
        basis = P.constants()[f"P_{i}"].double()
        assert basis.var() * 3 * P.k[i] == pytest.approx(1.0, abs=0.02)
        assert basis.mean().abs() * P.k[i] ** 0.5 < 0.01


@SEEDS
@torch.no_grad()
def test_unnormalised_unilora_is_pefts_with_unit_scales(seed: int) -> None:
    _, model = wrap("UNILORA", seed, save_indices=True)
    for layer in layers(model).values():
        layer.unilora_scales_A["default"].fill_(1.0)
        layer.unilora_scales_B["default"].fill_(1.0)
    P, theta_d = from_peft(model)
    rows = P.index.long()
    assert torch.equal(P(theta_d), theta_d[rows])
    for name, ours in deltas(P.layout, theta_d[rows], model).items():
        assert error(ours, peft_delta(layers(model)[name])) < 1e-12

    plain = build("unilora_unnormalised", d=50, layout=P.layout, seed=seed)
    to_peft(plain, theta_d, model)
    for name, ours in deltas(P.layout, plain(theta_d), model).items():
        assert error(ours, peft_delta(layers(model)[name])) < 1e-12


def test_unnormalised_unilora_is_unilora_up_to_column_lengths() -> None:
    layout = LoRALayout.from_shapes(SHAPES, 3)
    unit, plain = (build(name, d=20, layout=layout, seed=4) for name in ("unilora", "unilora_unnormalised"))
    lengths = plain.to_dense().norm(dim=0)
    assert error(unit.to_dense() * lengths, plain.to_dense()) < 1e-12


@pytest.mark.parametrize("kind", ["LORA", "UNILORA", "VERA", "VBLORA"])
def test_linear_methods_give_even_quadratic_updates(kind: str) -> None:
    """c = 0: delta W(a theta_d) = a^2 delta W(theta_d), so theta_d is known only up to its sign."""
    P, theta_d = from_peft(wrap(kind)[1])
    update, negative, tripled = (_updates(P.layout, P(a * theta_d).detach()) for a in (1.0, -1.0, 3.0))
    for module in P.layout.modules:
        assert torch.equal(negative[module], update[module])
        assert error(tripled[module], 9 * update[module]) < 1e-12
