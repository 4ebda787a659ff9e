"""Every product with Triton kernels at a size of theta_D: the call, on meta tensors, and what no cubin tells of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from experiments.errors import ExperimentError

_WIDTH, _RANK = 4096, 4  # of the modules whose factors the operators of shared matrices make
_VECTORS, _LENGTH, _TOP = 2048, 256, 2  # the bank of a mixture
_SEGMENT = 2**17  # numbers that one Walsh-Hadamard transform takes
_DENSE = 1024  # columns of a dense random P


@dataclass(frozen=True)
class Read:
    """Reads of single numbers at random places of an array of `size` bytes; `cold`: which lies in no cache yet."""

    count: float
    size: float
    cold: bool = False


@dataclass(frozen=True)
class Operator:
    """A call, the trips of the loops of its kernels, and what it moves.

    streamed: bytes read and written one after the other from memory; cached: bytes that the second-level cache gives
    likewise, as they are read again and again. `goal`: in copies, where there is one.
    """

    name: str
    D: int
    d: int
    call: Callable[[], object]
    trips: Mapping[str, Sequence[float]]
    streamed: float
    cached: float = 0.0
    reads: Sequence[Read] = field(default=())
    goal: float | None = None


def operators(D: int, d: int) -> Iterator[Operator]:
    """All at about D coordinates; d: of the partition. Raises ExperimentError for a D that no partition has."""
    if (most := _permutation().MOST) < D:
        raise ExperimentError(f"prediction: D must be at most {most:,}, got {D:,}. Take a smaller one.")
    yield from _partition(D, d)
    yield from _shared(max(1, D // (2 * _WIDTH * _RANK)))
    yield from _grouped(max(1, D // (2 * _WIDTH * _RANK)))
    yield from _mixtures(max(1, D // _LENGTH))
    yield from _dense(D)
    yield from _segments(max(1, D // _SEGMENT))


def _partition(D: int, d: int) -> Iterator[Operator]:
    kernels = import_module("uniproj.kernels.deal")
    deal = kernels.Deal.of([kernels.Group([slice(0, D)], d, "prediction")], 0)
    source = [*_meta(deal.by_row, deal.by_position, deal.groups, deal.tables), [D, d]]
    maps = _operator("partition", "maps_of_one")(_empty(d, dtype=torch.float64), *source)
    tables = float(deal.tables.nbytes)
    walks = {rows: _walks(D, rows) for rows in (256, 128)}  # of the points of a warp
    rounds = _permutation().ROUNDS
    # round 0 and round 1 of a row read the tables next to where its neighbours do, and so does round 5 backwards
    yield Operator(
        "Uni-LoRA, forward", D, d, partial(maps.forward, _empty(d)),
        {"_scaled": (), "_deal_out": (walks[256],)}, 4.0 * D + 16.0 * d,
        reads=(Read((rounds - 2) * D, tables), Read(D, 4.0 * d)), goal=1.5,
    )  # fmt: skip
    yield Operator(
        "Uni-LoRA, adjoint", D, d, partial(maps.adjoint, _empty(D)),
        {"_gather_in": (-(-D // d) / 4, walks[128])}, 12.0 * d,
        reads=(Read((rounds - 1) * D, tables), Read(D, 4.0 * D, cold=True)), goal=4.0,
    )  # fmt: skip


def _shared(modules: int) -> Iterator[Operator]:
    """VeRA, Tied-LoRA: one B and one A for all modules, a scaler for each row."""
    size = _WIDTH * _RANK
    starts = range(0, 2 * modules * size, size)
    blocks = [(start, _WIDTH, _RANK) for start in starts[:modules]] + [(s, _RANK, _WIDTH) for s in starts[modules:]]
    table, extents, _ = import_module("uniproj.kernels.shared").block_table(blocks, [0] * modules + [1] * modules)
    D, matrix, scale = 2 * modules * size, _empty(1, extents[0]), _empty(1, extents[1])
    rest, y, d = (*_meta(table), [D, *extents], torch.float32), _empty(1, 2 * modules * size), extents[1]
    scales, matrices = 4.0 * d, 4.0 * extents[0]
    call = partial(_operator("shared", "product"), matrix, scale, *rest)
    # the result is filled with 0 first, as blocks may leave gaps
    yield Operator("Shared matrices, forward", D, d, call, {"_product": ()}, 8.0 * D + scales + matrices, 4.0 * D)
    call = partial(_operator("shared", "matrix_gradient"), y, scale, *rest)
    # of all blocks the first of A and the first of B sum the rest, eight at a time
    trips: Mapping[str, Sequence[float]] = {"_matrix_gradient": (2 / (2 * modules) * -(-modules // 8),)}
    yield Operator("Shared matrices, matrix gradient", D, d, call, trips, 4.0 * D + scales + 2 * matrices)
    call = partial(_operator("shared", "scale_gradient"), y, matrix, *rest)
    # half of the blocks are wide: their four rows are one tile, which one of their four programs has; half are tall
    trips = {"_scale_gradient": (1 / 2 / 4, _WIDTH / 256, _WIDTH / 256 / 4 / 2)}
    yield Operator("Shared matrices, scale gradient", D, d, call, trips, 4.0 * D + 2 * scales, 4.0 * D)


def _grouped(modules: int) -> Iterator[Operator]:
    """LoRA-XS: of every module B = U R, and A as it is: a column times 1."""
    size = _WIDTH * _RANK
    D, N = 2 * modules * size, modules * _RANK**2 + 1
    y, x = (torch.empty(n, device="meta") for n in (D, N))
    factors, (*R, one) = y.split(size), x.split([*[_RANK**2] * modules, 1])
    blocks = []
    for B, A, square in zip(factors[::2], factors[1::2], R, strict=True):
        B, A = B.view(_WIDTH, _RANK), A.view(-1, 1)
        blocks += [(B, B, square.view(_RANK, _RANK)), (A, A, one.view(1, 1))]
    table, sizes = import_module("uniproj.kernels.grouped").block_table(blocks, D, N, constants=1)
    rest = (_empty(D, dtype=torch.float64), *_meta(table), sizes, torch.float32)
    # all programs of an A but a quarter of those of a B, which has a quarter of the rows, and these take four products
    trips = {"_product": ((1 + 1 / _RANK) / 2, 2 / (1 + 1 / _RANK))}
    yield Operator(
        "Grouped products, forward", D, N - 1, partial(_operator("grouped", "product"), _empty(1, N), *rest),
        trips, 12.0 * D,
    )  # fmt: skip
    # a program for each row of an R: of each B and its gradient four read every sector
    trips = {"_transpose_product": (1 / 2, _WIDTH / 256)}
    yield Operator(
        "Grouped products, adjoint", D, N - 1, partial(_operator("grouped", "transpose_product"), _empty(1, D), *rest),
        trips, 6.0 * D, 6.0 * D * (_RANK - 1),
    )  # fmt: skip


def _segments(count: int) -> Iterator[Operator]:
    """Fastfood: the transform and the permutation of each of its blocks."""
    n, x = count * _SEGMENT, _empty(count, _SEGMENT)
    # two passes over groups of bits, each of which reads and writes all numbers
    call = partial(_operator("hadamard", "transform"), x, torch.float32)
    yield Operator("Walsh-Hadamard", n, n, call, {"_pass": ()}, 16.0 * n)
    rounds, length = _permutation().ROUNDS, _permutation().grid(_SEGMENT)[0]
    tables = _empty(count * rounds * length, dtype=torch.int32)
    call = partial(_operator("fastfood", "permuted"), x.unsqueeze(0), tables, slice(0, count), False)
    reads = (Read((rounds - 2) * n, 4.0 * rounds * length), Read(n, 4.0 * _SEGMENT))
    yield Operator("Permutation", n, n, call, {"_permute": (_walks(_SEGMENT, 256),)}, 8.0 * n, reads=reads)


def _permutation() -> Any:
    return import_module("uniproj.kernels.permutation")


def _walks(n: int, points: int) -> float:
    """The chance that one of so many points leaves [0, n), and all of them walk on."""
    a, b = _permutation().grid(n)
    return 1 - (n / (a * b)) ** points


def _mixtures(pieces: int) -> Iterator[Operator]:
    """VB-LoRA: each piece of theta_D mixes two vectors of a bank."""
    D, d = pieces * _LENGTH, _VECTORS * _LENGTH
    y, vectors, weights = _empty(1, D), _empty(1, _VECTORS, _LENGTH), _empty(pieces, _TOP)
    index, places = (_empty(pieces, 2, dtype=torch.int64) for _ in range(2))
    rest = (index, places, [D, _VECTORS, _LENGTH], torch.float32)
    pairs, both = 28.0 * pieces * _TOP, 4.0 * _TOP * D
    call = partial(_operator("topk", "mix"), vectors, weights, *rest)
    yield Operator("Mixture, forward", D, d, call, {"_mix": ()}, 4.0 * D + pairs, both)
    call = partial(_operator("topk", "vectors_gradient"), y, weights, *rest)
    trips = {"_vectors_gradient": (-(-pieces * _TOP // _VECTORS) / 32,)}
    yield Operator("Mixture, vectors gradient", D, d, call, trips, both + pairs + 4.0 * d)
    call = partial(_operator("topk", "weights_gradient"), y, vectors, *rest)
    trips = {"_weights_gradient": (_LENGTH / 64,)}
    yield Operator("Mixture, weights gradient", D, d, call, trips, both + pairs, both)


def _dense(D: int) -> Iterator[Operator]:
    """Dense Gaussian P, whose entries are drawn in the kernel."""
    table = import_module("uniproj.kernels.gaussian").block_table(0, "prediction", [(D, _DENSE)])
    rest = (*_meta(table, torch.ones(1, dtype=torch.float64)), True, [D, _DENSE, D, _DENSE, 0], torch.float32)
    call = partial(_operator("gaussian", "times"), _empty(1, _DENSE), *rest)
    # the second loop reduces a large angle, and there is none
    yield Operator("Dense random, forward", D, _DENSE, call, {"_times": (_DENSE / 64, 0)}, 4.0 * D)
    call = partial(_operator("gaussian", "transpose_times"), _empty(1, D), *rest)
    rows = max(2**10, -(-D // (2**22 // _DENSE)))
    trips = {"_transpose_times": (rows / 32, 0)}
    yield Operator("Dense random, adjoint", D, _DENSE, call, trips, 4.0 * D + 2 * 4.0 * _DENSE * -(-D // rows))


def _operator(file: str, name: str) -> Any:
    return getattr(import_module(f"uniproj.kernels.{file}_triton"), name)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _meta(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to("meta") for tensor in tensors]
