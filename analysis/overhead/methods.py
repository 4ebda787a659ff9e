"""The methods of the kernel part: uniproj's projections, PEFT's layers, PyTorch's own operators, and the floors.

PyTorch's operators compute Uni-LoRA's theta_D[i] = theta_d[index[i]] scale[index[i]]: each holds its own copy of what
it needs, and applies the scale to d numbers, before the gather and after the sum. All methods go through autograd:
PyTorch's own where it has the derivative, else a Function that calls the adjoint.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import UniLoraConfig, VBLoRAConfig, get_peft_model
from peft.tuners.unilora.layer import UniLoraLayer
from peft.tuners.vblora.layer import VBLoRALayer
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional as F

import uniproj
from analysis.overhead.problem import SEED, Candidate, Method, Problem, backward
from analysis.overhead.shapes import growing, sub_vectors
from uniproj import Projection

ADAPTER = "default"
_SHARED_BY_THREADS, _FEW = 3.7e5, 128  # a D, and a d that every method accepts there
_Map = Callable[[Tensor], Tensor]


def build(problem: Problem, name: str) -> Projection:
    """The projection on the layout and the device of a problem; a d that the method decides itself is left out."""
    cls = uniproj.get(name)
    hyperparameters: dict[str, Any] = sub_vectors(problem.layout) if name == "vblora" else {}
    if cls.needs_base_weights:
        hyperparameters["base_weights"] = problem.base_weights
    d = problem.d if cls.free_d else None
    return uniproj.build(name, layout=problem.layout, d=d, **hyperparameters).to(problem.device)


def _as_method(P: Projection, problem: Problem) -> Method:
    """theta_D = P theta_d + c and autograd back into theta_d and P's Parameters: what a training step calls."""
    parameters = [P.init_theta().to(problem.device).requires_grad_(), *P.parameters()]
    return Method(lambda: P(parameters[0]), lambda theta_D: backward([theta_D], parameters, [problem.y]), parameters)


def candidate(name: str, peak: float) -> Candidate:
    """A projection of uniproj as a candidate under its own name."""
    return Candidate(name, lambda problem: _as_method(build(problem, name), problem), peak)


def load(name: str, device: torch.device) -> None:
    """Use a projection once on few numbers and once on many, which threads share by loops of their own.

    What is loaded on first use is neither its memory nor its time.
    """
    for D in (0, _SHARED_BY_THREADS):
        method = _as_method(build(problem := Problem(growing(D), _FEW, device), name), problem)
        method.adjoint(method.forward())


class _Stack(nn.Module):
    """One linear layer per module of the layout, in its order, whose weight is a single zero."""

    def __init__(self, problem: Problem):
        super().__init__()
        self.linears = nn.ModuleList()
        for out_features, in_features in problem.layout.shapes().values():
            linear = nn.Linear(1, 1, bias=False)
            zero = torch.zeros(1, 1, device=problem.device)
            linear.weight = nn.Parameter(zero.expand(out_features, in_features), requires_grad=False)
            linear.out_features, linear.in_features = out_features, in_features
            self.linears.append(linear)

    def forward(self, x: Tensor) -> Tensor:
        return x


def _peft_unilora(problem: Problem) -> Method:
    """Every layer's gather of A and B, and autograd back into theta_d."""
    r = problem.layout.blocks[0].shape[1]
    model = get_peft_model(
        _Stack(problem), UniLoraConfig(r=r, theta_d_length=problem.d, target_modules=r"linears\.\d+")
    ).to(problem.device)
    parameters = [model.base_model.unilora_theta_d[ADAPTER]]
    return _of_layers([m for m in model.modules() if isinstance(m, UniLoraLayer)], parameters, problem.y)


def _peft_vblora(problem: Problem) -> Method:
    """Every layer's mixture of sub-vectors, and autograd back into these and the logits."""
    r = problem.layout.blocks[0].shape[1]
    config = VBLoRAConfig(r=r, target_modules=r"linears\.\d+", **sub_vectors(problem.layout))
    model = get_peft_model(_Stack(problem), config).to(problem.device)
    layers = [m for m in model.modules() if isinstance(m, VBLoRALayer)]
    logits = [p for layer in layers for p in (layer.vblora_logits_B[ADAPTER], layer.vblora_logits_A[ADAPTER])]
    return _of_layers(layers, [model.base_model.vblora_vector_bank[ADAPTER], *logits], problem.y)


def _of_layers(layers: list[Any], parameters: list[Tensor], y: Tensor) -> Method:
    def forward() -> list[Tensor]:
        return [factor for layer in layers for factor in layer._get_lora_matrices(ADAPTER)]

    shapes = [factor.shape for factor in forward()]
    pieces = y.split([shape.numel() for shape in shapes])
    gradients = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
    return Method(forward, lambda outputs: backward(outputs, parameters, gradients), parameters)


PEFT_UNILORA = Candidate("PEFT UNILORA", _peft_unilora, 48)
PEFT_VBLORA = Candidate("PEFT VBLORA", _peft_vblora, 48)


def copy(problem: Problem) -> Method:
    """Copy D floats into memory that is there: what moving theta_D once must cost."""
    source, target = problem.y, torch.empty_like(problem.y)
    return Method(lambda: target.copy_(source), lambda _: None)


def clone(problem: Problem) -> Method:
    """The same into fresh memory, which every operator that returns a new theta_D must ask for."""
    source = problem.y
    return Method(lambda: source.clone(), lambda _: None)


class _Linear(torch.autograd.Function):
    """What calls a forward, and its adjoint in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: _Map, adjoint: _Map) -> Tensor:  # type: ignore[override]
        ctx.adjoint = adjoint
        return forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.adjoint(grad), None, None


def _differentiated(problem: Problem, forward: _Map, adjoint: _Map | None = None) -> Method:
    """x -> `forward`(x), and back through autograd: by `adjoint` where it is given, else by PyTorch's derivative."""
    theta_d, y = problem.x.clone().requires_grad_(), problem.y
    if adjoint is None:
        return Method(lambda: forward(theta_d), lambda out: backward([out], [theta_d], [y]), [theta_d])
    return Method(
        lambda: _Linear.apply(theta_d, forward, adjoint), lambda out: backward([out], [theta_d], [y]), [theta_d]
    )


def _indexing(problem: Problem) -> Method:
    """x[index] with int64 indices."""
    index, scale = problem.index.clone().to(problem.device), problem.scale
    return _differentiated(problem, lambda x: (x * scale)[index])


def _index_select(problem: Problem) -> Method:
    """index_select with int32 indices."""
    index, scale = problem.index.int().to(problem.device), problem.scale
    return _differentiated(problem, lambda x: (x * scale).index_select(0, index))


def _index_add(problem: Problem) -> Method:
    """index_select forward and index_add_ back, with int32 indices."""
    index, scale, d = problem.index.int().to(problem.device), problem.scale, problem.d
    return _differentiated(
        problem,
        lambda x: (x * scale).index_select(0, index),
        lambda y: y.new_zeros(d).index_add_(0, index, y).mul_(scale),
    )


def _sparse_csr(problem: Problem) -> Method:
    """P and P^T as torch.sparse CSR matrices with int32 indices, both built beforehand."""
    columns = problem.index.int().numpy()
    values = problem.scale.cpu().numpy()[columns]
    rows = np.arange(problem.D + 1, dtype=np.int32)
    P = sparse.csr_matrix((values, columns, rows), shape=(problem.D, problem.d))
    forth, back = (_to_torch(matrix, problem.device) for matrix in (P, P.T.tocsr()))
    return _differentiated(problem, lambda x: forth @ x, lambda y: back @ y)


def _to_torch(matrix: sparse.csr_matrix, device: torch.device) -> Tensor:
    pointers, indices, values = (torch.from_numpy(a).to(device) for a in (matrix.indptr, matrix.indices, matrix.data))
    return torch.sparse_csr_tensor(pointers, indices, values, matrix.shape, check_invariants=False)


def _embedding_bag(problem: Problem) -> Method:
    """embedding_bag both ways: D bags of one row of theta_d, and d bags that sum rows of y."""
    scale, device = problem.scale, problem.device
    index = problem.index.int().to(device).unsqueeze(1)
    by_column = sparse.csr_matrix(
        (np.empty(problem.D, dtype=np.bool_), problem.index.int().numpy(), np.arange(problem.D + 1, dtype=np.int32)),
        shape=(problem.D, problem.d),
    ).tocsc()
    order = torch.from_numpy(by_column.indices).to(device)
    first = torch.from_numpy(by_column.indptr[:-1].copy()).to(device)
    return _differentiated(
        problem,
        lambda x: F.embedding_bag(index, (x * scale).unsqueeze(1), mode="sum").squeeze(1),
        lambda y: F.embedding_bag(order, y.unsqueeze(1), first, mode="sum").squeeze(1).mul_(scale),
    )


COPY, CLONE = "copy", "clone"
FLOORS = (Candidate(COPY, copy, 4), Candidate(CLONE, clone, 8))
PEERS = (
    Candidate("x[idx]", _indexing, 32),
    Candidate("index_select", _index_select, 16),
    Candidate("index_select + index_add_", _index_add, 16),
    Candidate("sparse CSR", _sparse_csr, 64),
    Candidate("embedding_bag", _embedding_bag, 48),
)


def butterfly(x: Tensor) -> Tensor:
    """H x along the last axis in log2 n passes of one addition and one subtraction, between two buffers."""
    n, half = x.shape[-1], 1
    source, target = x, torch.empty_like(x)
    spare = torch.empty_like(x)
    while half < n:
        pairs, sums = (t.view(-1, n // (2 * half), 2, half) for t in (source, target))
        torch.add(pairs[:, :, 0], pairs[:, :, 1], out=sums[:, :, 0])
        torch.sub(pairs[:, :, 0], pairs[:, :, 1], out=sums[:, :, 1])
        source, target, spare = target, spare, target
        half *= 2
    return source


def fastfood(problem: Problem, hadamard: _Map) -> Method:
    """Fastfood from PyTorch's operators around a function that computes H x along the last axis.

    theta_D = first D rows of [H G_b Pi_b H B_b]_b (theta_d, 0) / sqrt(n D), n the power of two at or above d. The
    signs, the permutation and the Gaussian diagonal of every block are drawn once and held: 16 bytes per row.
    """
    D, d = problem.D, problem.d
    n = 1 << (d - 1).bit_length()
    blocks = -(-D // n)
    generator = torch.Generator().manual_seed(SEED)
    B = torch.randint(0, 2, (blocks, n), generator=generator).mul_(2).sub_(1).float().to(problem.device)
    G = torch.randn(blocks, n, generator=generator).to(problem.device)
    Pi = torch.stack([torch.randperm(n, generator=generator) for _ in range(blocks)]).to(problem.device)
    scale = (n * D) ** -0.5

    def forward(x: Tensor) -> Tensor:
        z = hadamard(F.pad(x, (0, n - d)) * B)
        return hadamard(z.gather(1, Pi).mul_(G)).view(-1)[:D] * scale

    def adjoint(y: Tensor) -> Tensor:
        z = hadamard(F.pad(y, (0, blocks * n - D)).view(blocks, n)).mul_(G)
        z = hadamard(torch.empty_like(z).scatter_(1, Pi, z))
        return z.mul_(B).sum(0)[:d] * scale

    return _differentiated(problem, forward, adjoint)


def _packaged(problem: Problem) -> Method:
    """With the CUDA kernel of the package fast-hadamard-transform."""
    return fastfood(problem, importlib.import_module("fast_hadamard_transform").hadamard_transform)


BUTTERFLY = Candidate("butterfly", lambda problem: fastfood(problem, butterfly), 48)
PACKAGE = Candidate("fast-hadamard-transform", _packaged, 40)
