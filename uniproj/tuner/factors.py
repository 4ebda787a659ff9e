"""theta_D inside a model: projected once, read by every layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from uniproj.errors import AdapterError
from uniproj.projection import Projection


@dataclass(frozen=True)
class Mixture:
    """One theta_d per row of the batch: row i uses thetas[rows[i]]. thetas (K, d), rows (n,) int64."""

    thetas: Tensor
    rows: Tensor


class FactorSource:
    """The factors of one adapter: views of one theta_D, shared by all layers.

    Training: `refresh` once per model forward gives one graph edge to theta_d for the whole model. Without
    gradients theta_D is kept until a trained number changes, so generation projects once.

    dtype: of the factors, where it is not that of theta_d; under autocast they have autocast's, as `linear` would
    cast each of them to it. held: within a forward of the whole model, which began with a refresh, no layer asks again.
    mixture: while it is set, its vectors stand for theta_d, and every factor has one matrix per row of the batch.
    """

    dtype: torch.dtype | None = None
    held: bool = False
    mixture: Mixture | None = None

    def __init__(self, theta_ds: nn.ParameterDict, projections: nn.ModuleDict, adapter_name: str):
        # looked up by name on each use: loading with assign=True replaces the Parameter object
        self._theta_ds, self._projections, self._name = theta_ds, projections, adapter_name
        self._views: Mapping[int, Tensor] = {}
        self._used: list[tuple[Mapping[str, Tensor | None], str, Tensor, int]] = []
        self._snapshot: list[Tensor] = []

    @property
    def projection(self) -> Projection:
        return self._projections[self._name]  # type: ignore[return-value]

    def trained(self) -> list[nn.Parameter]:
        return [self._theta_ds[self._name], *self.projection.parameters()]

    def _theta(self) -> Tensor:
        return self._theta_ds[self._name] if self.mixture is None else self.mixture.thetas

    def _inputs(self) -> list[Tensor]:
        """What theta_D is made of."""
        return [self._theta(), *self.projection.parameters()]

    def refresh(self) -> None:
        """Bring theta_D up to date: always when a gradient is wanted, else only if a trained number changed."""
        if self._wants_grad() or self._is_stale() or self._changed():
            self._project()

    def view(self, slot: int) -> Tensor:
        """The factor of block number `slot`. Projects first if no forward of the model has done so."""
        if not self.held and not torch.compiler.is_compiling():
            without_graph = self._wants_grad() and bool(self._views) and not self._has_graph()
            if without_graph or not self._is_current():
                self._project()
        return self._views[slot]

    def install(self, views: Mapping[int, Tensor]) -> None:
        """Use these factors, by slot, until the next refresh; none of them to forget all."""
        self._views, self._snapshot = views, []
        self._used = self._in_use() if views else []

    def _is_stale(self) -> bool:
        """Whether there is no theta_D, or one of another dtype or with the graph of a training step."""
        wanted = self._output_dtype()
        return not self._views or self._has_graph() or any(v.dtype != wanted for v in islice(self._views.values(), 1))

    def _has_graph(self) -> bool:
        return any(view.requires_grad for view in islice(self._views.values(), 1))

    def _output_dtype(self) -> torch.dtype:
        theta = self._theta()
        if torch.is_autocast_enabled(theta.device.type):
            return torch.get_autocast_dtype(theta.device.type)
        return self.dtype or theta.dtype

    def _wants_grad(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self._inputs())

    def _changed(self) -> bool:
        # by value: an edit through `.data` leaves the version counter as it was
        pairs = list(zip_longest(self._inputs(), self._snapshot))
        return not all(
            old is not None and old.dtype == new.dtype and old.device == new.device and torch.equal(old, new)
            for new, old in pairs
        )

    def _in_use(self) -> list[tuple[Mapping[str, Tensor | None], str, Tensor, int]]:
        """Every tensor of `_inputs` with its version and its place, where another one may stand later."""
        mixed = None if self.mixture is None else {self._name: self.mixture.thetas}
        places: list[tuple[Mapping[str, Tensor | None], str]] = [(mixed or self._theta_ds._parameters, self._name)]
        places += [(module._parameters, key) for module in self.projection.modules() for key in module._parameters]
        return [(held, key, p, p._version) for held, key in places if (p := held[key]) is not None]

    def _is_current(self) -> bool:
        # asked by every layer on every call, hence the remembered places: walking the modules costs 5 % of a token
        for held, key, p, version in self._used:
            if held[key] is not p or p._version != version:
                return False
        return bool(self._used)

    def _project(self) -> None:
        self._views = {}  # the old theta_D goes first, so that there are never two
        if self._wants_grad():
            self._views, self._snapshot = self._split(), []
        else:
            # normal tensors even under inference_mode, so that a later training step may use them
            with torch.inference_mode(False), torch.no_grad():
                self._views = self._split()
                if not torch.compiler.is_compiling():
                    self._snapshot = [p.detach().clone() for p in self._inputs()]
        if not torch.compiler.is_compiling():
            self._used = self._in_use()

    def _split(self) -> dict[int, Tensor]:
        return dict(enumerate(self.projection.layout.split(self._theta_D())))

    def _theta_D(self) -> Tensor:
        """(D,), or in a mixed batch (n, D); a vector that serves several rows is projected once."""
        dtype, mixture = self._output_dtype(), self.mixture
        if mixture is None:
            return self.projection(self._theta(), dtype)
        if len(mixture.rows) <= len(mixture.thetas):
            return self.projection(mixture.thetas.index_select(0, mixture.rows), dtype)
        return self.projection(mixture.thetas, dtype).index_select(0, mixture.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_views": {}, "_used": [], "_snapshot": [], "held": False, "mixture": None}


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
