"""Modules that read the weight of an adapted layer in place of calling it, and so bypass its adapter."""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from itertools import dropwhile
from types import CodeType, FrameType
from typing import Any

import torch
import torch._dynamo
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.jit._trace import is_tracing
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from uniproj.errors import AdapterError
from uniproj.tuner.layers import OutProjection, is_tied, weight_of

# attributes that let PyTorch's own encoders hand the weights of their layers to one kernel, or pack padded batches for
# it; the results are the same without, but for rounding and for what stands in the padding
_FAST_PATHS: list[tuple[type[nn.Module], str, Any]] = [
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
]


# in the names of operators that compute activations with a weight: mm, bmm, _scaled_mm, gemm_4bit, conv2d, _addmv, ..
_PRODUCTS = (
    *("mm", "mv", "dot", "inner", "matmul", "linear", "convolution", "conv1d", "conv2d", "conv3d", "conv_", "einsum"),
    *("cdist", "attention", "transformer", "lstm", "gru", "rnn"),
)

_COMPILER = torch._dynamo.eval_frame.__file__
_OF_MODE = (__file__, _COMPILER, torch._compile.__file__)


class Guard:
    """Checks that a model calls its adapted layers.

    PyTorch's encoders do so once their fast paths are off, so these are off while they hold an adapter. All other
    modules are watched during the first call of each kind (`UniProjModel` says what a call is): in training and
    evaluation, with and without gradients, with and without autocast, with the same arguments given (neither None nor
    False), with a sequence of one (axis 1 of the first tensor) and of more, since modules choose their paths by these.
    A path that a module chooses by anything else (how full a cache is, a longer sequence, a number) is not checked
    unless the first such call takes it.

    A weight counts as read when it, or what was made of it, enters a product (of matrices, a convolution, attention)
    together with something else; what was reduced to one number, as in penalties and logs, is forgotten. That is
    allowed if the same call of the model also calls the layer, or if no adapter acts on it at the time. Compiled and
    traced code is not checked.

    Such a call raises AdapterError at its end. If another module holds the weight too, it may rightly be that module
    which is called, as where only an encoder's or a decoder's embedding is adapted: then a call of the whole model in
    training warns, and no other is checked.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._layers: dict[str, LoraLayer] = {}
        self._fast: list[tuple[nn.Module, str, Any]] = []
        self._seen: set[tuple[Any, ...]] = set()

    def renew(self) -> None:
        """Begin again, as the adapters have changed."""
        self.remove()
        self._seen.clear()
        # an output projection is adapted with its attention, which reads the weight
        found = {n: m for n, m in self._model.named_modules() if isinstance(m, LoraLayer) and m.r}
        self._layers = {name: layer for name, layer in found.items() if not isinstance(layer, OutProjection)}
        adapted = set(self._layers.values())
        for module in self._model.modules():
            for kind, name, off in _FAST_PATHS:
                if isinstance(module, kind) and not adapted.isdisjoint(module.modules()):
                    self._fast.append((module, name, getattr(module, name)))
                    setattr(module, name, off)

    def remove(self) -> None:
        """Restore the fast paths."""
        for module, name, before in self._fast:
            setattr(module, name, before)
        self._fast = []

    def begin(self, module: nn.Module, active: Iterable[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A call of the model begins at this module."""
        if torch.compiler.is_compiling() or is_tracing() or not self._layers:
            return
        if torch._C._current_graph_task_id() != -1:  # checkpointing runs a part again, whose forward was watched
            return
        if (left := _reads.get()) is not None:  # by a call that was interrupted
            left.end()
        first = next(iter(self._layers.values()))
        autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
        adapters = first.merged, first.disable_adapters, *active
        kind = module.training, torch.is_grad_enabled(), autocast, adapters, _given(args, kwargs)
        if self._seen.isdisjoint({(self._model, kind), (module, kind)}):
            _reads.set(_Reads(self._model, (module, kind), self._layers))

    def end(self, module: nn.Module, output: Any) -> None:
        """The call is over; it has no output if it raised an error of its own."""
        if torch.compiler.is_compiling() or (reads := _reads.get()) is None or reads.call[0] is not module:
            return
        reads.end()
        if output is None:
            return
        passed_by = sorted(reads.read - reads.called)
        for name in filter(reads.others.__contains__, passed_by):
            warnings.warn(
                f"{name}: the model must call an adapted layer, got a call in training that uses its weight, but in "
                f"{' or '.join(reads.others[name])}, so this adapter has no effect in it. Name in target_modules "
                "those of them that the model calls.",
                RuntimeWarning,
                stacklevel=2,
            )
        if passed_by := [name for name in passed_by if name not in reads.others]:
            around = type(self._model.get_submodule(passed_by[0].rpartition(".")[0])).__name__
            mode = "training" if module.training else "evaluation"
            raise AdapterError(
                f"{passed_by[0]}: the model must call this layer, got a forward (in {mode}) that reads its weight past "
                f"the adapter, which then has no effect. Leave the layers of {around} out of target_modules, or make "
                "it call them."
            )
        self._seen.add(reads.call)


class _Reads(TorchDispatchMode):
    """Records, until `end`, the adapted layers whose weight is read by other modules, and those that read their own."""

    def __init__(self, model: nn.Module, call: tuple[Any, ...], layers: Mapping[str, LoraLayer]):
        super().__init__()
        self.call = call
        self.read: set[str] = set()
        self.called: set[str] = set()
        self._layers = layers
        self.others: dict[str, list[str]] = {}  # modules that hold the weight of a layer too
        self._made_of: dict[int | None, set[str]] = {}
        self._kept: list[StorageWeakRef] = []
        holders: defaultdict[int | None, list[tuple[str, Tensor]]] = defaultdict(list)
        for key, parameter in model.named_parameters(remove_duplicate=False):
            holders[_storage(parameter)].append((key.rpartition(".")[0].replace(".base_layer", ""), parameter))
        tied = {_storage(weight_of(layer)) for layer in layers.values() if any(is_tied(layer, n) for n in layer.r)}
        module, (is_training, with_gradients, *_) = call
        is_whole = module is model and is_training and with_gradients
        for name, layer in layers.items():
            weight = weight_of(layer)
            if not isinstance(weight, Tensor) or not _applies(layer):
                continue
            held = holders[storage := _storage(weight)]
            if len(held) == 1:
                self._note(weight, {name})
            elif held and is_whole and storage not in tied and all(parameter is weight for _, parameter in held):
                self.others[name] = [other for other, _ in held if other != name.replace(".base_layer", "")]
                self._note(weight, {name, *self._made_of.get(storage, ())})
        self.__enter__()

    def end(self) -> None:
        self.__exit__(None, None, None)
        _reads.set(None)

    @classmethod
    def is_infra_mode(cls) -> bool:
        """So that torch.compile ignores this mode."""
        return True

    def _note(self, tensor: Tensor, names: set[str]) -> None:
        if (storage := _storage(tensor)) is not None:
            self._made_of[storage] = names
            # a reference keeps the address from being given to a later tensor
            self._kept.append(StorageWeakRef(tensor.untyped_storage()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        found = [self._made_of.get(_storage(tensor), set()) if tensor.numel() > 1 else set() for tensor in tensors]
        if any(found) and not _takes_no_numbers(func):
            names = set().union(*found)
            if not all(found):
                inside = {name for name in names if _runs(self._layers[name])}
                self.called |= inside
                names -= inside
                if _is_product(func):
                    self.read |= names
                    names = set()
            for made in tree_leaves(result) if names else ():
                if isinstance(made, Tensor):
                    self._note(made, names)
        return result


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[frozenset[int | str], bool]:
    """Which arguments a call has, and whether its sequence has length one, as in generation with a cache."""
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    axes = next((x.shape for _, x in given if isinstance(x, Tensor) and not x.is_nested and x.ndim > 1), None)
    one = axes is not None and bool(axes[1] == 1)
    return frozenset(name for name, value in given if value is not None and value is not False), one


def _runs(layer: LoraLayer) -> bool:
    """Whether a layer's code runs at the moment. Compiled code cannot be told apart, so it counts as the layer's."""
    # innermost is the mode itself, which PyTorch keeps out of torch.compile by a frame of the compiler's
    for code, first in dropwhile(lambda found: found[0].co_filename in _OF_MODE, _frames()):
        if first is layer or code.co_filename == _COMPILER:
            return True
    return False


def _frames() -> Iterator[tuple[CodeType, Any]]:
    """The stack of this thread, innermost first: code and first argument of each frame."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        yield code, frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        frame = frame.f_back


def _applies(layer: LoraLayer) -> bool:
    active = any(name in layer.r for name in layer.active_adapters)
    return active and not layer.merged and not layer.disable_adapters


def _takes_no_numbers(func: Any) -> bool:
    """Whether an operator looks at shape, dtype and device alone: zeros_like, new_empty and the like."""
    name = func.overloadpacket.__name__
    return name.endswith(("_like", "_as")) or name.startswith("new_")


def _is_product(func: Any) -> bool:
    name = func.overloadpacket.__name__
    return torch.Tag.pointwise not in func.tags and any(word in name for word in _PRODUCTS)


def _storage(tensor: Tensor) -> int | None:
    """An id of the memory a tensor uses, or None if it has none (sharded, wrapped, fake, on the meta device)."""
    if is_fake(tensor):
        return None
    try:
        storage = tensor.untyped_storage()
        return storage._cdata if storage.data_ptr() else None
    except (NotImplementedError, RuntimeError):
        return None


_reads: ContextVar[_Reads | None] = ContextVar("_reads", default=None)
