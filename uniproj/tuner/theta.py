"""theta_D inside a model: projected once, read by every layer."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active, _current_graph_task_id, _is_tracing
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.functional import linear
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


def _is_transformed() -> bool:
    """Whether torch.func, forward mode or torch.jit.trace is at work, whose tensors must not outlive it."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0 or _is_tracing()


def _is_backward() -> bool:
    """Whether a backward runs, and within it a checkpointed part runs again."""
    return _current_graph_task_id() != -1


@dataclass(eq=False)
class _ThetaD:
    """One theta_D, as the views B and A of all sites of the layout.

    No views are left once a backward has passed through. step: optimiser steps of this process before it was made; None
    if it was made while compiled or transformed. node: that of the graph which made it.
    """

    views: Sequence[Tensor]
    step: int | None = None
    node: Any = None

    def is_current(self) -> bool:
        """Whether the call it was made in may go on using it. Asked three times per layer: the likely comes first."""
        if is_compiling():
            return True
        if _is_transformed():
            return self.step is None
        # a step taken during backward must not part a checkpointed layer that runs again from its forward
        is_of_now = self.step == _optimizer_steps or (self.step is not None and _is_backward())
        return is_of_now and bool(self.views)


@dataclass(eq=False, kw_only=True)
class _Kept(_ThetaD):
    """A theta_D without a graph, which may serve another call.

    flat: what its views are views of. inputs: copies of theta_d (or of `PerRow`) and of P's Parameters, on the CPU.
    """

    flat: Tensor
    dtype: torch.dtype
    inputs: Sequence[Tensor]


class _Unwritten:
    """Tells without reading a number that tensors are the same and were not written to, except through their `.data`.

    It holds on to their memory, so that no later tensor can lie at the same address.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self._memory, self._versions = [t.detach() for t in tensors], _versions(tensors)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        same = [t.data_ptr() for t in tensors] == [t.data_ptr() for t in self._memory]
        return same and None not in self._versions and _versions(tensors) == self._versions


def _versions(tensors: Sequence[Tensor]) -> list[int | None]:
    """How often each was written to; None for a tensor made under inference_mode, of which PyTorch counts nothing."""
    return [None if t.is_inference() else t._version for t in tensors]


class _OfThread(threading.local):
    """State that belongs to one thread; a copy of it begins anew."""

    def __reduce__(self) -> Any:
        return type(self), ()


class Call(_OfThread):
    """The call of a model that a thread is in. module: where it entered, None between calls; theta_Ds: by adapter.

    generated: the theta_Ds of the `generate` that the thread is in, by adapter; None outside of one.
    """

    module: nn.Module | None
    theta_Ds: dict[str, _ThetaD]
    generated: dict[str, tuple[_Kept, _Unwritten]] | None

    def __init__(self) -> None:
        self.generated = None
        self.end()

    def begin(self, module: nn.Module) -> None:
        self.module, self.theta_Ds = module, {}

    def end(self) -> None:
        self.module, self.theta_Ds = None, {}

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Within the block, theta_D is compared with what makes it once, and not in each call."""
        outer = self.generated
        self.generated = {} if outer is None else outer
        try:
            yield
        finally:
            self.generated = outer

    def forget(self, name: str) -> None:
        """Nothing made so far serves this adapter."""
        self.theta_Ds.pop(name, None)
        if self.generated is not None:
            self.generated.pop(name, None)


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
    - without them takes the last theta_D again on the CPU, if what made it is the same *by value* and the dtype is the
      same, so that an edit through `.data` is seen. Elsewhere it projects anew, as comparing would wait for the device;
    - within one `generate` takes the theta_D of the call before, unless an optimiser stepped or PyTorch has counted a
      write to what made it. What a callback writes through `.data`, which is not counted, is seen by the next
      `generate`, and so is by compiled code what a callback writes in any way;
    - within a backward is a checkpointed part that runs again: it takes the theta_D of its forward, or, where a
      backward has passed through that or the checkpoint is reentrant, projects anew;
    - under torch.func or forward-mode differentiation, and under torch.compile outside of `generate`, projects anew and
      keeps nothing. So does the capture of a CUDA graph, whose replays then see every edit.
    A layer called by itself, or by the one module around it, is in no call: each look at its factors is one.

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
        self._kept: _Kept | None = None
        self._live: list[weakref.ref[_ThetaD]] = []
        call.forget(adapter_name)  # what an interrupted call left of another adapter of this name

    @property
    def projection(self) -> Projection:
        return self._projections[self._name]  # type: ignore[return-value]

    @property
    def per_row(self) -> PerRow | None:
        """What stands for theta_d in this thread, within `using`."""
        return self._here.per_row

    def parameters(self) -> list[nn.Parameter]:
        return [self._theta_ds[self._name], *self.projection.parameters()]

    def views(self) -> Sequence[Tensor]:
        """The factors of all sites of the layout, now: see `LoRALayout.split_sites`."""
        theta_D = self._call.theta_Ds.get(self._name)
        if theta_D is None or not theta_D.is_current():
            theta_D = self._new()
            if self._call.module is not None:
                self._call.theta_Ds[self._name] = theta_D
        return theta_D.views

    def refresh(self) -> None:
        """Forget `views`, and have new ones ready where the next call without gradients would take them."""
        self._call.forget(self._name)
        if self._call.generated is not None or self._inputs()[0].device.type == "cpu":
            self.views()

    @contextmanager
    def using(self, per_row: PerRow) -> Iterator[None]:
        """Within the block, and in this thread, every factor has one matrix per row of the batch."""
        before, self._here.per_row = self._here.per_row, per_row
        self._call.forget(self._name)
        try:
            yield
        finally:
            self._here.per_row = before
            self._call.forget(self._name)

    # ---- theta_D ------------------------------------------------------------------------------------

    def _new(self) -> _ThetaD:
        if is_compiling():
            return _ThetaD(self._split(self._generated()))
        if _is_transformed():
            return _ThetaD(self._split(self._project()))
        if not self.wants_grad():
            return self._without_graph()
        return (self._of_forward() if _is_backward() else None) or self._with_graph()

    def wants_grad(self) -> bool:
        """Whether what is projected now may be differentiated by backward."""
        return torch.is_grad_enabled() and any(p.requires_grad for p in self._inputs())

    def _of_forward(self) -> _ThetaD | None:
        """The theta_D that the backward of this moment is going to walk through.

        None in a reentrant checkpoint, which makes a graph of its own and walks it at once; the other kind watches what
        is saved, and walks no graph.
        """
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
            return None
        live = [theta_D for ref in self._live if (theta_D := ref()) and theta_D.views]
        return next((theta_D for theta_D in live if torch._C._will_engine_execute_node(theta_D.node)), None)

    def _with_graph(self) -> _ThetaD:
        self._here.last = self._kept = None  # the old theta_Ds go first, so that there are never two
        with uncounted():  # a checkpointed layer may find theta_D ready when it runs again
            flat = self._project()
        self._here.last = theta_D = _ThetaD(self._split(flat), _optimizer_steps, flat.grad_fn)
        flat.register_hook(_end(weakref.ref(theta_D)))
        self._live = [*(ref for ref in self._live if ref() is not None), weakref.ref(theta_D)]
        return theta_D

    def _without_graph(self) -> _ThetaD:
        inputs, generated = self._inputs(), self._call.generated
        if generated is None:
            return self._of_values(inputs)
        if known := generated.get(self._name):
            theta_D, unwritten = known
            if theta_D.dtype == self._dtype() and theta_D.step == _optimizer_steps and unwritten.holds(inputs):
                return theta_D
        unwritten = _Unwritten(inputs)  # first: what is written from here on is seen
        theta_D = self._of_values(inputs)
        generated[self._name] = theta_D, unwritten
        return theta_D

    def _of_values(self, inputs: Sequence[Tensor]) -> _Kept:
        """The theta_D of these numbers: the last one, if they are at hand on the CPU and the same."""
        dtype, kept = self._dtype(), self._kept
        # detached, as a real tensor is a fake one only to what is done with it under FakeTensorMode
        at_hand = inputs[0].device.type == "cpu" and not is_fake(inputs[0].detach())
        if at_hand and kept is not None and kept.dtype == dtype and _equal(kept.inputs, inputs):
            kept.step = _optimizer_steps
            return kept
        self._kept = None
        # normal tensors even under inference_mode, so that a later training step may use them
        with torch.inference_mode(False), torch.no_grad():
            # copied first: what another thread changes meanwhile then differs from the copy
            copies = [p.detach().clone() for p in inputs] if at_hand else []
            flat = self._project()
        theta_D = _Kept(self._split(flat), _optimizer_steps, flat=flat, dtype=dtype, inputs=copies)
        self._kept = theta_D if at_hand else None
        return theta_D

    def _generated(self) -> Tensor:
        """theta_D for compiled code: an input of it within `generate`, once there is one, else made by it."""
        known = (self._call.generated or {}).get(self._name)
        if known and known[0].dtype == self._dtype() and not self.wants_grad():
            return known[0].flat
        return self._project()

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

    def _split(self, theta_D: Tensor) -> Sequence[Tensor]:
        return self.projection.layout.split_sites(theta_D)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None, "_live": []}


def _end(theta_D: weakref.ref[_ThetaD]) -> Callable[[Tensor], None]:
    """A hook for the backward that passes through; weak, as the graph would keep what holds its views for ever."""

    def end(_: Tensor) -> None:
        if (walked := theta_D()) is not None:
            walked.views, walked.node = (), None

    return end


def _equal(old: Sequence[Tensor], new: Sequence[Tensor]) -> bool:
    """Whether all bits are the same. old: on the CPU."""
    return len(old) == len(new) and all(
        (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape) and np.array_equal(_bits(a), _bits(b))
        for a, b in zip(old, new, strict=True)
    )


def _bits(x: Tensor) -> np.ndarray:
    # NumPy compares integers in a fifth of the time of `torch.equal` on floats that lie in the cache
    return x.detach().contiguous().view(-1).view(getattr(torch, f"int{8 * x.itemsize}")).numpy()


class Factor(nn.Module):
    """Stands in for the `nn.Linear` of PEFT's `lora_A` / `lora_B`; its weight is a view of theta_D.

    slot: the index of its view among those of the source; shape: of that view.
    """

    bias = None

    def __init__(self, source: FactorSource, slot: int):
        super().__init__()
        self._source, self._slot = source, slot
        self.site = site = source.projection.layout.sites[slot // 2]
        shape = (site.r, site.in_features) if slot % 2 else (site.out_features, site.r)
        self.out_features, self.in_features = shape
        self.shape = shape if site.count is None else (site.count, *shape)

    def view(self) -> Tensor:
        """The view of theta_D, which `weight` may show in another shape."""
        return self._source.views()[self._slot]

    @property
    def weight(self) -> Tensor:
        return self.view()

    def of_view(self, view: Tensor) -> Factor:
        """This factor with other numbers. view: of its `shape`, (rows, columns), in a stack (count, rows, columns)."""
        twin = copy.copy(self)
        twin._source = cast(FactorSource, SimpleNamespace(views=lambda: {self._slot: view}, per_row=None))
        return twin

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The numbers this weight is made of, so that PEFT trains and freezes them as it does a LoRA weight.

        They are registered with the tuner, once, and not here.
        """
        return iter(self._source.parameters())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out). In a mixed batch x (n, ..., in), and row i has a weight of its own."""
        weight = self.view()
        if weight.device != x.device:
            weight = weight.to(x.device)
        if weight.ndim == 2:
            return linear(x, weight)
        if x.ndim < 3 or len(x) != len(weight):
            self.refuse_rows(x, f"tokens, features) = ({len(weight)}, .., {self.in_features})")
        return torch.bmm(x.flatten(1, -2), weight.mT).unflatten(1, x.shape[1:-1])

    def refuse_rows(self, x: Tensor, wanted: str) -> NoReturn:
        """Raise AdapterError for an input whose rows are not those of a mixed batch. wanted: its axes and sizes."""
        raise AdapterError(
            f"mixed: {self.site.name} must get (rows of the batch, {wanted}, got {tuple(x.shape)}. Pass one entry of "
            "rows per row of the batch (per beam in a beam search), and adapt no layer that sees tokens without a "
            "batch axis."
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, view of theta_D"
