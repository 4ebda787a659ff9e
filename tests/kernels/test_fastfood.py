"""Fastfood's blocks against products with SciPy's Hadamard matrix and the specification of Pi."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.library import opcheck

from uniproj import build
from uniproj.kernels import dispatch
from uniproj.kernels.fastfood import adjoint, diagonal, length, packed, product
from uniproj.kernels.permutation import images, permute, round_tables

F64 = torch.float64
# one number, less than a vector, one tile and less, grids that are square and not, one to three passes behind the tile
SIZES = [
    (1, 1),
    (5, 2),
    (20, 7),
    (300, 100),
    (700, 129),
    (256, 256),
    (1500, 300),
    (2500, 1000),
    (5000, 2000),
    (9000, 4000),
]


def constants(D: int, d: int, signs: bool) -> list[Tensor]:
    """B, G, tables and scales of as many blocks as D asks for."""
    n, generator = length(d), torch.Generator().manual_seed(D + d)
    blocks = -(-D // n)
    bits = torch.randint(2, (2, blocks, n), generator=generator)
    G = packed(bits[1]) if signs else torch.randn(blocks, n, generator=generator)
    return [packed(bits[0]), G, round_tables(n, 3, "p", blocks), torch.rand(blocks, generator=generator, dtype=F64)]


def by_hand(x: Tensor, y: Tensor, D: int, d: int, B: Tensor, G: Tensor, tables: Tensor, scales: Tensor) -> list[Tensor]:
    """P x and P^T y of rows x (m, d), y (m, D), by H as a matrix and Pi as an index."""
    n = length(d)
    H, padded = torch.from_numpy(scipy.linalg.hadamard(n)).double(), torch.nn.functional.pad(x, (0, n - d))
    rows = torch.nn.functional.pad(y, (0, len(scales) * n - D)).view(len(y), -1, n)
    forth, back = [], torch.zeros(len(y), n, dtype=F64)
    for k, scale in enumerate(scales):
        Pi = permute(torch.arange(n), n, 3, "p", torch.tensor([k]))
        left, right = (diagonal(each[k : k + 1], n, F64)[0] for each in (G, B))
        forth.append(scale * ((padded * right) @ H)[:, Pi] * left @ H)
        back += (torch.zeros_like(back).index_copy(1, Pi, scale * (rows[:, k] @ H) * left) @ H) * right
    return [torch.cat(forth, 1)[:, :D], back[:, :d]]


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize(("D", "d"), SIZES)
def test_the_operators_follow_the_definition(D: int, d: int, signs: bool, device: str) -> None:
    if D > 2500 and dispatch.backend(device) == "triton-interpreter":
        pytest.skip("the interpreter is slow, and takes the same way at smaller sizes")
    given = constants(D, d, signs)
    there = [*[c.to(device) for c in given], [D, d]]
    x, y = torch.randn(3, d, dtype=F64), torch.randn(3, D, dtype=F64)
    Px, Py = by_hand(x, y, D, d, *given)
    for dtype, eps in ((F64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for operator, v, wanted in ((product, x, Px), (adjoint, y, Py)):
            found = operator(v.to(device, dtype), *there, dtype)
            assert found.dtype == dtype and found.device.type == device and found.shape == wanted.shape
            assert (found.cpu().double() - wanted).abs().max() <= 3 * eps * wanted.abs().max()


@pytest.mark.parametrize(("D", "d"), SIZES)
def test_loops_and_torch_agree(D: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In numbers whose sums are exact: the same terms, whatever their order."""
    B, G, tables, scales = constants(D, d, True)
    arguments = [B, G, tables, torch.ones_like(scales), [D, d]]
    x, y = torch.randint(-8, 9, (2, d)).float(), torch.randint(-8, 9, (2, D)).float()
    found = product(x, *arguments, F64), adjoint(y, *arguments, F64)
    with monkeypatch.context() as without:
        without.setattr(dispatch, "HAS_NUMBA", False)
        without.setattr(dispatch, "_warn_once", lambda missing: None)
        assert torch.equal(product(x, *arguments, F64), found[0])
        assert torch.equal(adjoint(y, *arguments, F64), found[1])


@pytest.mark.parametrize("n", [1, 2, 7, 31, 32, 33, 100])
def test_packed_signs_are_signs(n: int) -> None:
    bits = torch.randint(2, (3, n))
    words = packed(bits)
    assert words.dtype == torch.int32 and words.shape == (3, -(-n // 32))
    assert torch.equal(diagonal(words, n, torch.float32), (-1.0) ** bits)


@pytest.mark.parametrize("n", [1, 2, 12, 512, 1000])
def test_images_are_permutations_of_their_parts(n: int) -> None:
    wanted = permute(torch.arange(n).expand(3, n), n, 5, "p", torch.arange(3).unsqueeze(1) + 2)
    assert torch.equal(images(n, round_tables(n, 5, "p", 3, 2)).long(), wanted)


def test_the_operators_keep_the_rules_of_torch_library() -> None:
    arguments = [*constants(20, 7, False), [20, 7], F64]
    opcheck(torch.ops.uniproj.fastfood_1.default, (torch.randn(2, 7, dtype=F64).requires_grad_(), *arguments))
    opcheck(torch.ops.uniproj.fastfood_0.default, (torch.randn(2, 20, dtype=F64).requires_grad_(), *arguments))


def test_the_same_bits_on_any_number_of_threads(set_threads: Callable[[int], None]) -> None:
    D, d = 600_000, 30_000  # 19 blocks, the last one cut
    P, found = build("fastfood", D, d), []
    x, y = torch.linspace(-1, 1, 2 * d).view(2, d), torch.linspace(-1, 1, 2 * D).view(2, D)
    for count in (1, 2, 3):
        set_threads(count)
        found.append((P(x), P.adjoint(y)))
    for forward, back in found[1:]:
        assert torch.equal(forward, found[0][0]) and torch.equal(back, found[0][1])


@pytest.mark.parametrize(("name", "most"), [("fastfood", 4.25), ("fastfood_sign", 0.375)])
def test_state_is_the_gaussian_numbers_alone(name: str, most: float) -> None:
    """Bytes per row of whole blocks: 4 of G and 1/8 of B, or 1/4 of both signs; and tables of O(sqrt n')."""
    P = build(name, 4 * 2**16, 2**16)
    P(torch.ones(2**16))
    assert sum(constant.nbytes for constant in P.constants().values()) <= most * P.D
