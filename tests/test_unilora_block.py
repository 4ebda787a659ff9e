"""Uni-LoRA in blocks, against its definition written out entry by entry."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from uniproj import LoRALayout, ProjectionError, build
from uniproj.kernels.permutation import permute
from uniproj.projections.unilora_block import BlockUniLoRA


def columns(D: int, d: int, seed: int, block: int) -> list[int]:
    """q(i) mod d of every row i."""
    whole = D // block
    pi = permute(torch.arange(whole), whole, seed, "unilora").tolist() if whole else []
    q = [block * pi[i // block] + i % block if i // block < whole else i for i in range(D)]
    assert sorted(q) == list(range(D))
    return [place % d for place in q]


@given(D=st.integers(1, 300), d=st.integers(1, 300), seed=st.integers(0, 2**64 - 1), block=st.integers(1, 20))
@example(D=5, d=5, seed=0, block=8)
@example(D=64, d=16, seed=1, block=8)
@example(D=67, d=16, seed=1, block=8)
@example(D=64, d=12, seed=1, block=8)
@example(D=64, d=4, seed=1, block=8)
def test_it_is_its_definition(D: int, d: int, seed: int, block: int) -> None:
    d = min(d, D)
    P, expected = build("unilora_block", D, d, seed=seed, block=block), columns(D, d, seed, block)
    n = Counter(expected)
    assert P.index.tolist() == expected and {n[j] for j in range(d)} <= {D // d, -(-D // d)}
    M = torch.zeros(D, d, dtype=torch.float64)
    for row, column in enumerate(expected):
        M[row, column] = 1 / math.sqrt(n[column])
    torch.testing.assert_close(P.to_dense(), M, rtol=1e-15, atol=0)
    x, y = torch.randn(2, d, dtype=torch.float64), torch.randn(2, D, dtype=torch.float64)
    torch.testing.assert_close(P(x), x @ M.T)
    torch.testing.assert_close(P.adjoint(y), y @ M)
    rows = torch.randint(0, D, (5,))
    torch.testing.assert_close(P.at_rows(x[0], rows), (M @ x[0])[rows])


def test_blocks_of_one_entry_are_unilora() -> None:
    one, single = build("unilora_block", 1001, 37, seed=5, block=1), build("unilora", 1001, 37, seed=5)
    x = torch.randn(37)
    assert torch.equal(one.index, single.index) and torch.equal(one(x), single(x))


@pytest.mark.parametrize("block", [4, 8])
def test_entries_of_a_block_never_share_a_number(block: int) -> None:
    layout = LoRALayout.from_shapes({f"h.{i}.q": (24, 16) for i in range(4)}, 3)
    for d in (40, 41, 100):
        index = build("unilora_block", layout=layout, d=d, block=block).index
        together = index[: layout.D - layout.D % block].view(-1, block)
        assert all(len(set(run.tolist())) == block for run in together)
        # neighbours in theta_d, around its end
        assert torch.equal(together[:, 1:], (together[:, :-1] + 1) % d)


def test_it_keeps_eight_bytes_per_run_beside_the_scales() -> None:
    P = build("unilora_block", 8000, 800)
    assert isinstance(P, BlockUniLoRA) and P.runs.dtype == P.order.dtype == P.starts.dtype == torch.int32
    sizes = {name: constant.nbytes for name, constant in P.constants().items()}
    assert sizes == {"scale": 8 * 800, "runs": 4 * 1000, "order": 4 * 1000, "starts": 4 * 100}


@pytest.mark.parametrize("block", [0, -8])
def test_a_block_without_entries_is_refused(block: int) -> None:
    with pytest.raises(ProjectionError, match=f"unilora_block: block must be at least 1, got {block}. Pass 4 or 8."):
        build("unilora_block", 100, 10, block=block)


def test_a_block_longer_than_theta_D_is_the_whole_of_it() -> None:
    assert build("unilora_block", 20, 6, block=10**15).index.tolist() == [i % 6 for i in range(20)]
