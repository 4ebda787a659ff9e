"""theta_D inside a model: projected once, read by every layer."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from uniproj.errors import AdapterError
from uniproj.projection import Projection
from uniproj.tuner.checkpointing import uncounted

_steps = 0  # of all optimisers of this process


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


# all optimisers pass here, also those that write through `.data` or by kernels of their own
register_optimizer_step_post_hook(_count_step)


@dataclass(frozen=True)
class Mixture:
    """One theta_d per row of the batch: row i uses thetas[rows[i]]. thetas (K, d), rows (n,) int64."""

    thetas: Tensor
    rows: Tensor


@dataclass
class ThetaD:
    """One theta_D, as the views of all blocks of the layout, and what it was made of.

    No views are left once a backward has passed through. step: optimiser steps of this process before it was made.
    node: that of the graph which made it. inputs: without a graph, copies of theta_d and P's Parameters (and of a
    mixture's rows), since it may serve another call.
    """

    views: Sequence[Tensor]
    step: int
    node: Any = None
    dtype: torch.dtype | None = None
    inputs: Sequence[Tensor] = ()


class OfThread(threading.local):
    """State that belongs to one thread; a copy of it begins anew."""

    def __reduce__(self) -> Any:
        return type(self), ()


class _Here(OfThread):
    """What one thread does with an adapter. walkable: holds the last theta_D with a graph, for its backward."""

    def __init__(self) -> None:
        self.inside = False
        self.current: ThetaD | None = None
        self.walkable: ThetaD | None = None
        self.mixture: Mixture | None = None


class FactorSource:
    """The factors of one adapter: views of one theta_D, shared by all layers.

    The rule: theta_D is current if nothing that makes it could have changed since. A *call* is one that enters the
    model from outside, at any of its modules (`UniProjModel` says when: `enter`, `leave`); within it, all layers use
    one theta_D, which ends early with any optimiser's step and with a backward that passes through it. A new call
    - with gradients projects anew, so that every forward has a graph of its own;
    - without them takes the last theta_D again, if what made it is the same *by value* and the dtype is the same, so
      that generation projects once and an edit through `.data` is seen;
    - within a backward is a checkpointed part that runs again: it takes the theta_D of its forward, or, where a
      backward has passed through that, projects anew;
    - under torch.compile, torch.func or forward-mode differentiation projects anew and keeps nothing.
    A layer called by itself is a call of its own.

    All of a call's state belongs to its thread. Shared are a theta_D without a graph, which nobody changes, and in a
    backward, which a GPU walks in a thread of its own, those whose graph it walks.

    dtype: of the factors, where it is not that of theta_d; under autocast they have autocast's, as `linear` would cast
    each of them to it.
    """

    dtype: torch.dtype | None = None

    def __init__(self, theta_ds: nn.ParameterDict, projections: nn.ModuleDict, adapter_name: str):
        # looked up by name on each use: loading with assign=True replaces the Parameter object
        self._theta_ds, self._projections, self._name = theta_ds, projections, adapter_name
        self._here = _Here()
        self._kept: ThetaD | None = None
        self._live: list[weakref.ref[ThetaD]] = []

    @property
    def projection(self) -> Projection:
        return self._projections[self._name]  # type: ignore[return-value]

    @property
    def mixture(self) -> Mixture | None:
        """What stands for theta_d in this thread, within `mixing`."""
        return self._here.mixture

    def trained(self) -> list[nn.Parameter]:
        return [self._theta_ds[self._name], *self.projection.parameters()]

    # ---- calls --------------------------------------------------------------------------------------

    def enter(self) -> None:
        """A call of the model begins in this thread."""
        self._here.inside, self._here.current = True, None

    def leave(self) -> None:
        """The call is over."""
        self._here.inside, self._here.current = False, None

    def refresh(self) -> None:
        """Have theta_D ready for the layers of this call, or for the next one without gradients."""
        theta_D = self._theta_D()
        if self._here.inside:
            self._here.current = theta_D

    def view(self, slot: int) -> Tensor:
        """The factor of block number `slot`."""
        theta_D = self._here.current
        if theta_D is None or not _holds(theta_D):
            theta_D = self._theta_D()
            if self._here.inside:
                self._here.current = theta_D
        return theta_D.views[slot]

    @contextmanager
    def mixing(self, mixture: Mixture) -> Iterator[None]:
        """Within the block, and in this thread, every factor has one matrix per row of the batch."""
        here, before = self._here, self._here.mixture
        here.mixture, here.current = mixture, None
        try:
            yield
        finally:
            here.mixture, here.current = before, None

    # ---- theta_D ------------------------------------------------------------------------------------

    def wants_grad(self) -> bool:
        """Whether what is projected now may be differentiated by backward."""
        return torch.is_grad_enabled() and any(p.requires_grad for p in self._inputs())

    def _theta_D(self) -> ThetaD:
        if torch.compiler.is_compiling() or _derives():
            return ThetaD(self._views(self._project()), 0)
        if not self.wants_grad():
            return self._without_graph()
        return self._of_forward() or self._with_graph()

    def _of_forward(self) -> ThetaD | None:
        """The theta_D that the backward of this moment is going to walk through."""
        live = [theta_D for ref in self._live if (theta_D := ref()) and theta_D.views] if _in_backward() else []
        return next((theta_D for theta_D in live if torch._C._will_engine_execute_node(theta_D.node)), None)

    def _with_graph(self) -> ThetaD:
        self._here.walkable = None  # the old theta_D goes first, so that there are never two
        with uncounted():  # a checkpointed layer may find theta_D ready when it runs again
            flat = self._project()
        self._here.walkable = theta_D = ThetaD(self._views(flat), _steps, flat.grad_fn)
        flat.register_hook(_end(weakref.ref(theta_D)))
        self._live = [*(ref for ref in self._live if ref() is not None), weakref.ref(theta_D)]
        return theta_D

    def _without_graph(self) -> ThetaD:
        dtype, inputs, kept = self._dtype(), self._inputs(), self._kept
        if kept is not None and kept.dtype == dtype and _equal(kept.inputs, inputs):
            kept.step = _steps
            return kept
        self._kept = None
        # normal tensors even under inference_mode, so that a later training step may use them
        with torch.inference_mode(False), torch.no_grad():
            # copied first: what another thread changes meanwhile then differs from the copy
            copies = [p.detach().clone() for p in inputs]
            theta_D = ThetaD(self._views(self._project()), _steps, None, dtype, copies)
        self._kept = theta_D
        return theta_D

    def _inputs(self) -> list[Tensor]:
        """What theta_D is made of."""
        mixture = self._here.mixture
        of_rows = [self._theta_ds[self._name]] if mixture is None else [mixture.thetas, mixture.rows]
        return [*of_rows, *self.projection.parameters()]

    def _dtype(self) -> torch.dtype:
        theta = self._inputs()[0]
        if torch.is_autocast_enabled(theta.device.type):
            return torch.get_autocast_dtype(theta.device.type)
        return self.dtype or theta.dtype

    def _project(self) -> Tensor:
        """(D,), or in a mixed batch (n, D); a vector that serves several rows is projected once."""
        dtype, mixture = self._dtype(), self._here.mixture
        if mixture is None:
            return self.projection(self._theta_ds[self._name], dtype)
        if len(mixture.rows) <= len(mixture.thetas):
            return self.projection(mixture.thetas.index_select(0, mixture.rows), dtype)
        return self.projection(mixture.thetas, dtype).index_select(0, mixture.rows)

    def _views(self, theta_D: Tensor) -> Sequence[Tensor]:
        return self.projection.layout.split(theta_D)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None, "_live": []}


def _holds(theta_D: ThetaD) -> bool:
    """Whether nothing has ended a theta_D since its call began."""
    if torch.compiler.is_compiling():
        return True
    # a step within a backward (fused into it) must not part a checkpointed layer from its forward
    return bool(theta_D.views) and (theta_D.step == _steps or _in_backward())


def _end(theta_D: weakref.ref[ThetaD]) -> Callable[[Tensor], None]:
    """A hook for the backward that passes through; weak, as the graph would keep what holds its views for ever."""

    def end(_: Tensor) -> None:
        if (walked := theta_D()) is not None:
            walked.views, walked.node = (), None

    return end


def _equal(old: Sequence[Tensor], new: Sequence[Tensor]) -> bool:
    return len(old) == len(new) and all(
        a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in zip(old, new, strict=True)
    )


def _derives() -> bool:
    """Whether torch.func, forward mode or torch.jit.trace is at work, whose tensors must not outlive it."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch.jit._trace.is_tracing()
    )


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


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
        return iter(self._source.trained())

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
