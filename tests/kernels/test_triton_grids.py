"""Grids that CUDA accepts whatever is launched: axes that end at 65,535, and none that is empty."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from uniproj.kernels import backend, gaussian, grouped, shared
from uniproj.kernels.deal import Deal, Group

if backend() == "triton-interpreter":
    pytest.skip("the interpreter has grids of any size", allow_module_level=True)

jit = pytest.importorskip("triton.runtime.jit")
from uniproj.kernels import gaussian_triton, grouped_triton, partition_triton, shared_triton, topk_triton  # noqa: E402

MANY = 70_000
F32 = torch.float32


def on_meta(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    monkeypatch.setattr(jit.JITFunction, "run", lambda self, *args, grid, **options: found.append(grid))
    return found


def partition(batch: int) -> None:
    deal = Deal.of([Group([slice(0, 300)], 40, "a")], 0)
    source = [getattr(deal, name).to("meta") for name in ("by_row", "by_position", "groups", "tables")]
    assert partition_triton.deal_out(on_meta(batch, 40), *source, [300, 40], F32).shape == (batch, 300)
    assert partition_triton.gather_in(on_meta(batch, 300), *source, [300, 40], F32).shape == (batch, 40)


def mixtures(batch: int) -> None:
    index, places, sizes = on_meta(3, 2, dtype=torch.int64), on_meta(3, 2, dtype=torch.int64), [12, 5, 4]
    y, vectors, weights = on_meta(batch, 12), on_meta(batch, 5, 4), on_meta(3, 2)
    topk_triton.mix(vectors, weights, index, places, sizes, F32)
    topk_triton.vectors_gradient(y, weights, index, places, sizes, F32)
    topk_triton.weights_gradient(y, vectors, index, places, sizes, F32)


def shared_matrices(blocks: int) -> None:
    table, extents, _ = shared.block_table([(6 * k, 2, 3) for k in range(blocks)], [0] * blocks)
    y, matrix, scale = on_meta(1, 6 * blocks), on_meta(1, extents[0]), on_meta(1, extents[1])
    rest: Any = (table.to("meta"), [6 * blocks, *extents], F32)
    shared_triton.product(matrix, scale, *rest)
    shared_triton.matrix_gradient(y, scale, *rest)
    shared_triton.scale_gradient(y, matrix, *rest)


def dense(blocks: int) -> None:
    table = gaussian.block_table(0, "x", [(3, 2)] * blocks).to("meta")
    divisors, sizes = on_meta(blocks, dtype=torch.float64), [3 * blocks, 2 * blocks, 3, 2, 6]
    gaussian_triton.times(on_meta(1, 2 * blocks), table, divisors, False, sizes, F32)
    gaussian_triton.transpose_times(on_meta(1, 3 * blocks), table, divisors, False, sizes, F32)


def grouped_products(blocks: int) -> None:
    x, y, F = torch.empty(blocks, 2), torch.empty(blocks, 3), torch.empty(3, 2)
    views = [(y[k].unsqueeze(1), F, x[k].unsqueeze(1)) for k in range(blocks)]
    table, sizes = grouped.block_table(views, 3 * blocks, 2 * blocks)
    rest: Any = (on_meta(6), table.to("meta"), sizes, F32)
    assert grouped_triton.product(on_meta(1, 2 * blocks), *rest).shape == (1, 3 * blocks)
    assert grouped_triton.transpose_product(on_meta(1, 3 * blocks), *rest).shape == (1, 2 * blocks)


@pytest.mark.parametrize("launch", [partition, mixtures, shared_matrices, grouped_products, dense])
def test_many_vectors_or_blocks(launch: Any, grids: list[tuple[int, ...]]) -> None:
    launch(MANY)
    assert grids and all(max(grid[1:], default=1) < 2**16 and max(grid) < 2**31 for grid in grids)
    assert sum(map(prod, grids)) >= MANY


def test_no_vectors_are_no_launch_of_a_partition(grids: list[tuple[int, ...]]) -> None:
    partition(0)
    assert not grids
