"""A short training of theta_d through any projection, and the adapters and gradients on its way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from analysis.command import bar
from analysis.subject import Head, Subject
from uniproj import Projection
from uniproj.algebra import Select

# AdamW of the head, and the fraction of the loss that a run must gain to count as trained.
HEAD_RATE, LEAST_GAIN = 5e-3, 0.01
_PROBED = 4


@dataclass
class Trajectory:
    """A finished training: theta_d, the head, the loss on the first four batches before and after.

    steps, thetas (n, d), gradients (n, d) of the loss by theta_d: the snapshots, the start first and the end last;
    learned: P's own Parameters at the same steps, empty for a fixed P.
    """

    theta_d: Tensor
    head: Head
    loss_before: float
    loss_after: float
    steps: list[int] = field(default_factory=list)
    thetas: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    learned: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def did_train(self) -> bool:
        """Whether the loss fell by 1 %."""
        return self.loss_after <= (1 - LEAST_GAIN) * self.loss_before


def train(
    subject: Subject, P: Projection, steps: int, lr: float, snapshots: int = 0, start: Tensor | None = None
) -> Trajectory:
    """AdamW with a linear decay on theta_d, a learned P (in place) and the head.

    snapshots: how many to keep, evenly spread, besides that of the start. start: theta_d (d,), by default P's own.
    """
    theta_d = nn.Parameter((P.init_theta(subject.setting.seed) if start is None else start.clone()).float())
    head = {name: nn.Parameter(value) for name, value in subject.head.items()}
    groups: list[dict[str, Any]] = [
        {"params": [theta_d, *P.parameters()]},
        {"params": list(head.values()), "lr": HEAD_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    trajectory = Trajectory(theta_d.data, head, _probe(subject, P, theta_d, head), float("nan"))
    kept = {round(i * steps / snapshots) for i in range(1, snapshots + 1)} if snapshots else set()
    for step, batch in enumerate(bar(subject.batches(steps), P.name)):
        loss = subject.loss(P(theta_d), head, batch)
        loss.backward()
        if snapshots and (step == 0 or step in kept):
            _keep(trajectory, P, step, theta_d)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    if snapshots:
        subject.loss(P(theta_d), head, subject.batches(1, skip=steps)[0]).backward()
        _keep(trajectory, P, steps, theta_d)
    trajectory.theta_d = theta_d.detach().clone()
    trajectory.head = {name: value.detach().clone() for name, value in head.items()}
    trajectory.loss_after = _probe(subject, P, theta_d, head)
    return trajectory


def train_lora(subject: Subject, steps: int, lr: float) -> tuple[Tensor, Head]:
    """(theta_D (D,), head) of LoRA itself, from where the subject stands."""
    every = Select(subject.layout, torch.arange(subject.layout.D))
    trajectory = train(subject, every, steps, lr, start=subject.theta_D)
    return trajectory.theta_d, trajectory.head


def _keep(trajectory: Trajectory, P: Projection, step: int, theta_d: nn.Parameter) -> None:
    assert theta_d.grad is not None
    trajectory.steps.append(step)
    trajectory.thetas.append(theta_d.detach().double().clone())
    trajectory.gradients.append(theta_d.grad.double().clone())
    trajectory.learned.append({name: p.detach().clone() for name, p in P.named_parameters()})


@torch.no_grad()
def _probe(subject: Subject, P: Projection, theta_d: Tensor, head: Head) -> float:
    theta_D = P(theta_d)
    return float(sum(subject.loss(theta_D, head, batch) for batch in subject.batches(_PROBED)) / _PROBED)
