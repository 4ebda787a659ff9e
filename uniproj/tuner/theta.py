"""theta_D inside a model: projected once, read by every layer."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from uniproj.errors import AdapterError
from uniproj.projection import Projection
from uniproj.tuner.checkpointing import uncounted

_optimizer_steps = 0  # of all optimisers of this process


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# all optimisers pass here, also those that write through `.data` or by kernels of their own
register_optimizer_step_post_hook(_count_step)


@dataclass(frozen=True)
class PerRow:
    """One theta_d per row of the batch: row i uses thetas[rows[i]]. thetas (K, d), rows (n,) int64."""

    thetas: Tensor
    rows: Tensor


class _Phase(Enum):
    """What PyTorch is doing in a thread that asks for theta_D."""

    COMPILED = auto()  # torch.compile is at work
    TRANSFORMED = auto()  # torch.func, forward mode or torch.jit.trace, whose tensors must not outlive it
    BACKWARD = auto()  # a backward runs, and within it a checkpointed part runs again
    EAGER = auto()

    @staticmethod
    def now() -> _Phase:
        if torch.compiler.is_compiling():
            return _Phase.COMPILED
        if (
            torch._C._are_functorch_transforms_active()
            or torch.autograd.forward_ad._current_level >= 0
            or torch.jit._trace.is_tracing()
        ):
            return _Phase.TRANSFORMED
        return _Phase.EAGER if torch._C._current_graph_task_id() == -1 else _Phase.BACKWARD


@dataclass
class _ThetaD:
    """One theta_D, as the views of all blocks of the layout, and what it was made of.

    No views are left once a backward has passed through. step: optimiser steps of this process before it was made; None
    if it was made while compiled or transformed. node: that of the graph which made it. inputs: without a graph, copies
    of theta_d (or of `PerRow`) and of P's Parameters, since it may serve another call.
    """

    views: Sequence[Tensor]
    step: int | None = None
    node: Any = None
    dtype: torch.dtype | None = None
    inputs: Sequence[Tensor] = ()

    def is_current(self, phase: _Phase) -> bool:
        """Whether the call it was made in may go on using it."""
        if phase is _Phase.COMPILED:
            return True
        if self.step is None:
            return phase is _Phase.TRANSFORMED
        # a step taken during backward must not part a checkpointed layer that runs again from its forward
        return bool(self.views) and (self.step == _optimizer_steps or phase is _Phase.BACKWARD)


class _OfThread(threading.local):
    """State that belongs to one thread; a copy of it begins anew."""

    def __reduce__(self) -> Any:
        return type(self), ()


class Call(_OfThread):
    """The call of a model that a thread is in. module: where it entered, None between calls; theta_Ds: by adapter."""

    module: nn.Module | None
    theta_Ds: dict[str, _ThetaD]

    def __init__(self) -> None:
        self.end()

    def begin(self, module: nn.Module) -> None:
        self.module, self.theta_Ds = module, {}

    def end(self) -> None:
        self.module, self.theta_Ds = None, {}


class _Here(_OfThread):
    """What one thread keeps for an adapter. last: its last theta_D with a graph, until the next one is made."""

    def __init__(self) -> None:
        self.last: _ThetaD | None = None
        self.per_row: PerRow | None = None


class FactorSource:
    """The factors of one adapter: views of one theta_D, shared by all layers.

    The rule: theta_D is current if nothing that makes it could have changed since. A *call* enters the model from
    outside, at any of its modules (`UniProjModel` says when it begins and ends); within it, all layers use one theta_D,
    until an optimiser steps or a backward passes through it. A new call
    - with gradients projects anew, so that every forward has a graph of its own;
    - without them takes the last theta_D again, if what made it is the same *by value* and the dtype is the same, so
      that generation projects once and an edit through `.data` is seen;
    - within a backward is a checkpointed part that runs again: it takes the theta_D of its forward, or, where a
      backward has passed through that, projects anew;
    - under torch.compile, torch.func or forward-mode differentiation projects anew and keeps nothing.
    A layer called by itself is a call of its own.

    The call belongs to its thread. Threads share a theta_D without a graph, which nobody changes, and during a
    backward, which a GPU runs in a thread of its own, the theta_Ds whose graph it walks.

    dtype: of the factors, where it is not that of theta_d; under autocast they have autocast's, as `linear` would cast
    each of them to it.
    """

    dtype: torch.dtype | None = None

    def __init__(self, theta_ds: nn.ParameterDict, projections: nn.ModuleDict, adapter_name: str, call: Call):
        # looked up by name on each use: loading with assign=True replaces the Parameter object
        self._theta_ds, self._projections, self._name = theta_ds, projections, adapter_name
        self._call, self._here = call, _Here()
        self._kept: _ThetaD | None = None
        self._live: list[weakref.ref[_ThetaD]] = []
        self._forget()  # what an interrupted call left of another adapter of this name

    @property
    def projection(self) -> Projection:
        return self._projections[self._name]  # type: ignore[return-value]

    @property
    def per_row(self) -> PerRow | None:
        """What stands for theta_d in this thread, within `using`."""
        return self._here.per_row

    def parameters(self) -> list[nn.Parameter]:
        return [self._theta_ds[self._name], *self.projection.parameters()]

    def view(self, slot: int) -> Tensor:
        """The factor of block number `slot`."""
        return self._theta_D().views[slot]

    def refresh(self) -> None:
        """Have theta_D ready for the layers of this call, or for the next one without gradients."""
        self._forget()
        self._theta_D()

    @contextmanager
    def using(self, per_row: PerRow) -> Iterator[None]:
        """Within the block, and in this thread, every factor has one matrix per row of the batch."""
        before, self._here.per_row = self._here.per_row, per_row
        self._forget()
        try:
            yield
        finally:
            self._here.per_row = before
            self._forget()

    def _forget(self) -> None:
        self._call.theta_Ds.pop(self._name, None)

    # ---- theta_D ------------------------------------------------------------------------------------

    def _theta_D(self) -> _ThetaD:
        phase = _Phase.now()
        theta_D = self._call.theta_Ds.get(self._name)
        if theta_D is None or not theta_D.is_current(phase):
            theta_D = self._new(phase)
            if self._call.module is not None:
                self._call.theta_Ds[self._name] = theta_D
        return theta_D

    def _new(self, phase: _Phase) -> _ThetaD:
        if phase in (_Phase.COMPILED, _Phase.TRANSFORMED):
            return _ThetaD(self._views(self._project()))
        if not self.wants_grad():
            return self._without_graph()
        return (self._of_forward() if phase is _Phase.BACKWARD else None) or self._with_graph()

    def wants_grad(self) -> bool:
        """Whether what is projected now may be differentiated by backward."""
        return torch.is_grad_enabled() and any(p.requires_grad for p in self._inputs())

    def _of_forward(self) -> _ThetaD | None:
        """The theta_D that the backward of this moment is going to walk through."""
        live = [theta_D for ref in self._live if (theta_D := ref()) and theta_D.views]
        return next((theta_D for theta_D in live if torch._C._will_engine_execute_node(theta_D.node)), None)

    def _with_graph(self) -> _ThetaD:
        self._here.last = self._kept = None  # the old theta_Ds go first, so that there are never two
        with uncounted():  # a checkpointed layer may find theta_D ready when it runs again
            flat = self._project()
        self._here.last = theta_D = _ThetaD(self._views(flat), _optimizer_steps, flat.grad_fn)
        flat.register_hook(_end(weakref.ref(theta_D)))
        self._live = [*(ref for ref in self._live if ref() is not None), weakref.ref(theta_D)]
        return theta_D

    def _without_graph(self) -> _ThetaD:
        dtype, inputs, kept = self._dtype(), self._inputs(), self._kept
        if kept is not None and kept.dtype == dtype and _equal(kept.inputs, inputs):
            kept.step = _optimizer_steps
            return kept
        self._kept = None
        # normal tensors even under inference_mode, so that a later training step may use them
        with torch.inference_mode(False), torch.no_grad():
            # copied first: what another thread changes meanwhile then differs from the copy
            copies = [p.detach().clone() for p in inputs]
            theta_D = _ThetaD(self._views(self._project()), _optimizer_steps, None, dtype, copies)
        self._kept = theta_D
        return theta_D

    def _inputs(self) -> list[Tensor]:
        """What theta_D is made of."""
        per_row = self._here.per_row
        theta_d = [self._theta_ds[self._name]] if per_row is None else [per_row.thetas, per_row.rows]
        return [*theta_d, *self.projection.parameters()]

    def _dtype(self) -> torch.dtype:
        theta = self._inputs()[0]
        if torch.is_autocast_enabled(theta.device.type):
            return torch.get_autocast_dtype(theta.device.type)
        return self.dtype or theta.dtype

    def _project(self) -> Tensor:
        """(D,), or in a mixed batch (n, D); a vector that serves several rows is projected once."""
        dtype, per_row = self._dtype(), self._here.per_row
        if per_row is None:
            return self.projection(self._theta_ds[self._name], dtype)
        if len(per_row.rows) <= len(per_row.thetas):
            return self.projection(per_row.thetas.index_select(0, per_row.rows), dtype)
        return self.projection(per_row.thetas, dtype).index_select(0, per_row.rows)

    def _views(self, theta_D: Tensor) -> Sequence[Tensor]:
        return self.projection.layout.split(theta_D)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None, "_live": []}


def _end(theta_D: weakref.ref[_ThetaD]) -> Callable[[Tensor], None]:
    """A hook for the backward that passes through; weak, as the graph would keep what holds its views for ever."""

    def end(_: Tensor) -> None:
        if (walked := theta_D()) is not None:
            walked.views, walked.node = (), None

    return end


def _equal(old: Sequence[Tensor], new: Sequence[Tensor]) -> bool:
    return len(old) == len(new) and all(
        a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in zip(old, new, strict=True)
    )


class Factor(nn.Module):
    """Stands in for the `nn.Linear` of PEFT's `lora_A` / `lora_B`; its weight is a view of theta_D."""

    bias = None

    def __init__(self, source: FactorSource, slot: int):
        super().__init__()
        self._source, self._slot = source, slot
        self.out_features, self.in_features = source.projection.layout.blocks[slot].shape

    @property
    def weight(self) -> Tensor:
        return self._source.view(self._slot)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The numbers this weight is made of, so that PEFT trains and freezes them as it does a LoRA weight.

        They are registered with the tuner, once, and not here.
        """
        return iter(self._source.parameters())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out). In a mixed batch x (n, ..., in), and row i has a weight of its own."""
        weight = self.weight.to(x.device)
        if weight.ndim == 2:
            return nn.functional.linear(x, weight)
        if x.ndim < 3 or len(x) != len(weight):
            module = self._source.projection.layout.blocks[self._slot].module
            raise AdapterError(
                f"mixed: {module} must get (rows of the batch, tokens, features) = ({len(weight)}, .., "
                f"{self.in_features}), got {tuple(x.shape)}. Pass one entry of rows per row of the batch (per beam in "
                "a beam search), and adapt no layer that sees tokens without a batch axis."
            )
        return torch.bmm(x.flatten(1, -2), weight.mT).unflatten(1, x.shape[1:-1])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, view of theta_D"
