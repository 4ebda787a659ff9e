"""Modules that read the weight of an adapted layer in place of calling it, and so pass its adapter by."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from itertools import dropwhile
from types import CodeType, FrameType
from typing import Any

import torch
import torch._dynamo
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from uniproj.errors import AdapterError

# attributes that let PyTorch's own encoders hand the weights of their layers to one kernel, or pack padded batches for
# it; the results are the same without, but for rounding and for what stands in the padding
_FAST_PATHS: list[tuple[type[nn.Module], str, Any]] = [
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
]


_COMPILER = torch._dynamo.eval_frame.__file__
_OF_MODE = (__file__, _COMPILER, torch._compile.__file__)


class Guard:
    """Sees to it that a model calls its adapted layers.

    PyTorch's encoders do so once their fast paths are off, which they are while they hold an adapter. Of all other
    modules it is found out at the first call of each kind (`UniProjModel` says what a call is): in training and
    evaluation, with and without gradients, with and without autocast, since modules choose their paths by these. A
    weight counts as read when it, or what was made of it alone, enters an operation together with something else. That
    is no fault where the layer is called in the same call of the model, or is not adapted at the time. Layers whose
    weight another module holds too are not judged: it may be that module which reads it; nor is compiled code.

    Such a call raises AdapterError at its end.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._layers: dict[str, LoraLayer] = {}
        self._fast: list[tuple[nn.Module, str, Any]] = []
        self._seen: set[tuple[Any, ...]] = set()

    def renew(self) -> None:
        """Look again, as there are other adapters now."""
        self.remove()
        self._seen.clear()
        self._layers = {name: m for name, m in self._model.named_modules() if isinstance(m, LoraLayer) and m.r}
        adapted = set(self._layers.values())
        for module in self._model.modules():
            for kind, name, off in _FAST_PATHS:
                if isinstance(module, kind) and not adapted.isdisjoint(module.modules()):
                    self._fast.append((module, name, getattr(module, name)))
                    setattr(module, name, off)

    def remove(self) -> None:
        """Give the fast paths back."""
        for module, name, before in self._fast:
            setattr(module, name, before)
        self._fast = []

    def begin(self, module: nn.Module, active: Iterable[str]) -> None:
        """A call of the model begins at this module."""
        if torch.compiler.is_compiling() or not self._layers:
            return
        if (left := _reads.get()) is not None:  # by a call that was interrupted
            left.end()
        first = next(iter(self._layers.values()))
        autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
        kind = module.training, torch.is_grad_enabled(), autocast, first.merged, first.disable_adapters, *active
        if self._seen.isdisjoint({(self._model, kind), (module, kind)}):
            _reads.set(_Reads(self._model, (module, kind), self._layers))

    def end(self, module: nn.Module, output: Any) -> None:
        """The call is over; it has no output if it raised an error of its own."""
        if torch.compiler.is_compiling() or (reads := _reads.get()) is None or reads.call[0] is not module:
            return
        reads.end()
        if output is None:
            return
        if passed_by := sorted(reads.read - reads.called):
            around = type(self._model.get_submodule(passed_by[0].rpartition(".")[0])).__name__
            mode = "training" if module.training else "evaluation"
            raise AdapterError(
                f"{passed_by[0]}: the model must call this layer, got a forward (in {mode}) that reads its weight past "
                f"the adapter, which then has no effect. Leave the layers of {around} out of target_modules, or make "
                "it call them."
            )
        self._seen.add(reads.call)


class _Reads(TorchDispatchMode):
    """Notes, from its making to its end, the adapted layers whose weight is read, and those which do so themselves."""

    def __init__(self, model: nn.Module, call: tuple[Any, ...], layers: Mapping[str, LoraLayer]):
        super().__init__()
        self.call = call
        self.read: set[str] = set()
        self.called: set[str] = set()
        self._layers = layers
        self._made_of: dict[int | None, set[str]] = {}
        self._kept: list[StorageWeakRef] = []
        holders = Counter(_storage(p) for _, p in model.named_parameters(remove_duplicate=False))
        for name, layer in layers.items():
            weight = getattr(layer.get_base_layer(), "weight", None)
            if isinstance(weight, Tensor) and holders[_storage(weight)] == 1 and _applies(layer):
                self._note(weight, {name})
        self.__enter__()

    def end(self) -> None:
        self.__exit__(None, None, None)
        _reads.set(None)

    @classmethod
    def is_infra_mode(cls) -> bool:
        """torch.compile need not mind."""
        return True

    def _note(self, tensor: Tensor, names: set[str]) -> None:
        if (storage := _storage(tensor)) is not None:
            self._made_of[storage] = names
            # while it is known, no later tensor gets the place of one that is gone
            self._kept.append(StorageWeakRef(tensor.untyped_storage()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        found = [self._made_of.get(_storage(tensor), set()) for tensor in tensors]
        if any(found) and not _takes_no_numbers(func):
            names = set().union(*found)
            if all(found):
                for made in tree_leaves(result):
                    if isinstance(made, Tensor):
                        self._note(made, names)
            else:
                self.read |= names
                self.called |= {name for name in names if _runs(self._layers[name])}
        return result


def _runs(layer: LoraLayer) -> bool:
    """Whether a layer is what runs now. Of compiled code nobody can tell, so it counts as the layer's."""
    # innermost is the mode itself, which PyTorch keeps out of torch.compile by a frame of the compiler's
    for code, first in dropwhile(lambda found: found[0].co_filename in _OF_MODE, _frames()):
        if first is layer or code.co_filename == _COMPILER:
            return True
    return False


def _frames() -> Iterator[tuple[CodeType, Any]]:
    """What runs in this thread, from the innermost on: code and its first argument."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        yield code, frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        frame = frame.f_back


def _applies(layer: LoraLayer) -> bool:
    active = any(name in layer.lora_A for name in layer.active_adapters)
    return active and not layer.merged and not layer.disable_adapters


def _takes_no_numbers(func: Any) -> bool:
    """Whether an operator looks at shape, dtype and device alone: zeros_like, new_empty and the like."""
    name = func.overloadpacket.__name__
    return name.endswith("_like") or name.startswith("new_")


def _storage(tensor: Tensor) -> int | None:
    """A name for where its numbers lie, or None for a tensor without (sharded, wrapped, on the meta device)."""
    try:
        storage = tensor.untyped_storage()
        return storage._cdata if storage.data_ptr() else None
    except (NotImplementedError, RuntimeError):
        return None


_reads: ContextVar[_Reads | None] = ContextVar("_reads", default=None)
