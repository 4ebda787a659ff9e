"""PEFT's own layers on the modules of a layout: the base weights cost nothing, the adapter is what PEFT builds."""

from __future__ import annotations

from typing import Any

import torch
from peft import UniLoraConfig, VBLoRAConfig, get_peft_model
from peft.tuners.unilora.layer import UniLoraLayer
from peft.tuners.vblora.layer import VBLoRALayer
from torch import Tensor, nn

from analysis.overhead.banks import bank
from analysis.overhead.problem import Candidate, Method, Problem, backward

ADAPTER = "default"


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


def unilora(problem: Problem) -> Method:
    """Every layer's gather of A and B, and autograd back into theta_d."""
    r = problem.layout.blocks[0].shape[1]
    model = get_peft_model(
        _Stack(problem), UniLoraConfig(r=r, theta_d_length=problem.d, target_modules=r"linears\.\d+")
    ).to(problem.device)
    trained = [model.base_model.unilora_theta_d[ADAPTER]]
    return _of_layers([m for m in model.modules() if isinstance(m, UniLoraLayer)], trained, problem.y)


def vblora(problem: Problem) -> Method:
    """Every layer's mixture of bank vectors, and autograd back into the bank and the logits."""
    r = problem.layout.blocks[0].shape[1]
    config = VBLoRAConfig(r=r, target_modules=r"linears\.\d+", **bank(problem.layout))
    model = get_peft_model(_Stack(problem), config).to(problem.device)
    layers = [m for m in model.modules() if isinstance(m, VBLoRALayer)]
    logits = [p for layer in layers for p in (layer.vblora_logits_B[ADAPTER], layer.vblora_logits_A[ADAPTER])]
    return _of_layers(layers, [model.base_model.vblora_vector_bank[ADAPTER], *logits], problem.y)


def _of_layers(layers: list[Any], trained: list[Tensor], y: Tensor) -> Method:
    def forward() -> list[Tensor]:
        return [factor for layer in layers for factor in layer._get_lora_matrices(ADAPTER)]

    shapes = [factor.shape for factor in forward()]
    pieces = y.split([shape.numel() for shape in shapes])
    gradients = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
    return Method(forward, lambda outputs: backward(outputs, trained, gradients), trained)


UNILORA = Candidate("PEFT UNILORA", unilora, 48)
VBLORA = Candidate("PEFT VBLORA", vblora, 48)
