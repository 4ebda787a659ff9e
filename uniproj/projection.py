"""`Projection`: the map theta_D = P theta_d + c, with its autograd."""

from __future__ import annotations

import copy
import hashlib
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn

from uniproj.budget import Budget
from uniproj.errors import ProjectionError
from uniproj.kernels.forms import MapsOfOne, is_plain, widest
from uniproj.kernels.random import uniform
from uniproj.layout import LoRALayout

Entries = tuple[Tensor, Tensor, Tensor]
_CHECKSUM_ROWS = 1024
_CHECKSUM_GRID = 2.0**-16
_OF_EVERY_P = frozenset({"layout", "d", "seed", "base_weights"})

_alive: WeakValueDictionary[int, Projection] = WeakValueDictionary()


@torch.library.custom_op("uniproj::linear_map", mutates_args=())
def _by_id(x: Tensor, key: int, transposed: bool, dtype: torch.dtype) -> Tensor:
    return _product(_alive[key], x, transposed, dtype).clone()


def _product(P: Projection, x: Tensor, transposed: bool, dtype: torch.dtype | None) -> Tensor:
    return P.rmatvec(x, dtype) if transposed else P.matvec(x, dtype)


class _LinearMap(torch.autograd.Function):
    """x -> P x or x -> P^T x. Each is the derivative of the other, so gradients exist to any order."""

    @staticmethod
    def forward(P: Projection, x: Tensor, transposed: bool, dtype: torch.dtype) -> Tensor:
        return _product(P, x, transposed, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Projection, Tensor, bool, torch.dtype], output: Tensor) -> None:
        ctx.P, x, ctx.transposed, ctx.dtype_out = inputs
        ctx.dtype_in = x.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:  # type: ignore[override]
        return None, _apply_map(ctx.P, grad, not ctx.transposed, ctx.dtype_in), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], P: Projection, x: Tensor, *rest: Any) -> tuple[Tensor, int]:
        return _apply_map(P, x.movedim(in_dims[1] or 0, 0), *rest), 0


class _PlainMap(torch.autograd.Function):
    """`_LinearMap` where nothing but autograd looks on: without `setup_context`, whose binding of arguments takes as
    long as a small product.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, P: Projection, x: Tensor, transposed: bool, dtype: torch.dtype | None, maps: MapsOfOne | None
    ) -> Tensor:
        ctx.P, ctx.transposed, ctx.dtype_in = P, transposed, x.dtype
        return maps(x, transposed) if maps else _product(P, x, transposed, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None, None]:  # type: ignore[override]
        return None, _apply_map(ctx.P, grad, not ctx.transposed, ctx.dtype_in), None, None, None


class _EagerMap(_LinearMap):
    """The same with what torch.compile cannot trace: forward-mode derivatives (jvp, jacfwd, hessian), `vectorize`."""

    @staticmethod
    def forward(P: Projection, x: Tensor, transposed: bool, dtype: torch.dtype) -> Tensor:
        if isinstance(x, Tensor) and torch._C._functorch.is_legacy_batchedtensor(x):
            # `vectorize=True` of torch.autograd can batch few operators; those of torch.library it calls one by one
            _alive[id(P)] = P
            return _by_id(x, id(P), transposed, dtype)
        return _LinearMap.forward(P, x, transposed, dtype)

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor, *__: None) -> Tensor:  # type: ignore[override]
        return _apply_map(ctx.P, tangent, ctx.transposed, ctx.dtype_out)


def _apply_map(P: Projection, x: Tensor, transposed: bool, dtype: torch.dtype | None) -> Tensor:
    # autograd goes through the maps of a learned P; torch.jit.trace records no Function that holds a module
    if P.learned or torch.jit._trace.is_tracing():
        return _product(P, x, transposed, dtype)
    if torch.compiler.is_compiling():
        return _LinearMap.apply(P, x, transposed, dtype or x.dtype)
    if is_plain(x):
        wants_grad = x.requires_grad and torch.is_grad_enabled()
        maps = P._of_one(x.device) if _is_one(P, x, transposed, dtype) else None
        if wants_grad and not (maps and maps.differentiable):
            return _PlainMap.apply(P, x, transposed, dtype, maps)
        return maps(x, transposed) if maps else _product(P, x, transposed, dtype)
    return _EagerMap.apply(P, x, transposed, dtype or x.dtype)


def _is_one(P: Projection, x: Tensor, transposed: bool, dtype: torch.dtype | None) -> bool:
    """Whether the product is of one float32 vector."""
    same = x.dtype is torch.float32 and (dtype is None or dtype is torch.float32)
    return same and x.ndim == 1 and len(x) == (P.D if transposed else P.d)


def _in_float64(form: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A form of P in float64; of a P on a device that has none, that of its exact copy on the CPU."""

    @wraps(form)
    def formed(P: Projection) -> Any:
        exact = P._in_full()
        return form(P) if exact is P else getattr(exact, form.__name__)()

    return formed


class _Maker(ABCMeta):
    """Records on every new P its hyperparameters and the conditional claims it meets, whatever its `__init__` does."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        P = super().__call__(*args, **kwargs)
        # not the base weights, which would live as long as P
        P.hyperparameters = {name: value for name, value in kwargs.items() if name not in _OF_EVERY_P}
        P.claims = P.claims.union(claim for claim, (_, holds) in P.claims_if.items() if holds(P))
        return P


class Projection(nn.Module, metaclass=_Maker):
    r"""theta_D = P theta_d + c for a fixed layout of theta_D (Uni-LoRA, arXiv 2506.00799, section 3).

    A new linear method writes `__init__`, `_matvec`, `_rmatvec` and either `to_dense` or `entries`, these
    last two from the definition of P and not from `_matvec`. Shapes inside these methods: theta_d (n, d) and
    theta_D (n, D), float32 or float64, contiguous. P's own numbers are tensors among its attributes (`constants`):
    `.to` moves and never rounds them, and copies of P hold copies of them. They are neither parameters nor buffers, so
    averages of weights (SWA, EMA) and state dicts leave them out; `register_buffer` makes such an attribute too.
    Half-precision inputs are computed in float32. Maps that read and write any dtype themselves set `casts = True` and
    take a second argument, the dtype of the result. A learned method holds Parameters, sets `learned = True`, and
    writes `_matvec` in differentiable torch code.

    Class attributes: `version` grows when the same arguments give another P; `claims` hold for every layout, d and
    seed, `claims_if` under a condition: {claim: (the condition in words, a function that decides it from P)}, and a P
    that meets it has the claim among its `claims`; `variants` are the hyperparameters the tests try; `sums_products`
    says that entries of P are sums, whose rounding depends on their order. Hyperparameters are keyword arguments;
    a P keeps those that it was made with in `hyperparameters`.

    Raises ProjectionError for d outside [min_d, D] and for inputs of a wrong shape or an integer dtype.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    claims: frozenset[str] = frozenset({"linear"})
    claims_if: ClassVar[Mapping[str, tuple[str, Callable[[Any], bool]]]] = {}
    formula: ClassVar[str] = ""
    d_formula: ClassVar[str] = "d (free)"
    source: ClassVar[str] = ""
    free_d: ClassVar[bool] = True
    learned: bool = False
    sparse: bool = False
    sums_products: bool = False
    casts: ClassVar[bool] = False
    needs_modules: ClassVar[bool] = False
    needs_base_weights: ClassVar[bool] = False
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    init_bound: float = 0.02

    hyperparameters: dict[str, Any]

    if TYPE_CHECKING:  # of nn.Module, by which it returns Any

        def __call__(self, theta_d: Tensor, dtype: torch.dtype | None = None) -> Tensor: ...

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in vars(cls).keys() & {"entries", "to_dense"}:
            setattr(cls, name, _in_float64(vars(cls)[name]))

        def place(name: str) -> int:
            return next(k for k, parent in enumerate(cls.__mro__) if name in vars(parent))

        # a map that is written anew, here or in a mixin, takes one argument, and has no other way, whatever others had
        written = min(place("_matvec"), place("_rmatvec"))
        if written < place("casts"):
            cls.casts = False
        if min(written, place("matvec"), place("rmatvec")) < place("_of_one"):
            cls._of_one = Projection._of_one  # type: ignore[method-assign]

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0):
        super().__init__()
        self.check_d(layout, d)
        if self.needs_modules and layout.is_flat:
            raise ProjectionError(f"{self.name}: this method needs module structure. Pass layout= instead of D=.")
        self.layout, self.d, self.seed = layout, d, seed
        self._exact: dict[str, Tensor] = {}  # the float64 numbers of a P on a device that has none

    @classmethod
    def check_d(cls, layout: LoRALayout, d: int) -> None:
        """Raises ProjectionError unless min_d <= d <= D."""
        least, D = cls.min_d(layout), layout.D
        if not least <= d <= D:
            way, what = "Raise" if d < least else "Lower", "d" if cls.free_d else f"what decides d = {cls.d_formula}"
            remedy = f"{way} {what}"
            if d > D and cls.free_d:
                # D grows with r, as d does not
                remedy += " or raise D" if layout.is_flat else ", raise r or adapt more modules"
            raise ProjectionError(f"{cls.name}: d must lie in [{least}, D] = [{least}, {D}], got {d}. {remedy}.")

    # ---- what a method writes ----------------------------------------------------------------------

    @abstractmethod
    def _matvec(self, theta_d: Tensor) -> Tensor:
        """(n, d) -> (n, D): P theta_d, without c."""

    @abstractmethod
    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        """(n, D) -> (n, d): P^T theta_D."""

    def _of_one(self, device: torch.device) -> MapsOfOne | None:
        """Maps of one vector that cost less Python than the two above, where a method has them on this device.

        At a D of 10,000 that Python is most of the time.
        """
        return None

    def entries(self) -> Entries:
        """(rows, columns, values) of every stored entry of a sparse P: int64, int64, float64; where `to_dense` is."""
        raise ProjectionError(f"{self.name}: P has no sparse form. Use to_dense() or to_scipy().")

    @property
    def offset(self) -> Tensor | None:
        """c, shape (D,), or None where c = 0."""
        return None

    def init_theta(self, seed: int = 0) -> Tensor:
        """(d,) float32 starting point, U(-0.02, 0.02) unless the method's source says otherwise.

        theta_d = 0 is never returned where c = 0: it is a saddle that no first-order optimiser leaves.
        """
        return (self.init_bound * uniform(seed, "theta_d", self.d)).float()

    @classmethod
    def min_d(cls, layout: LoRALayout) -> int:
        """Smallest d this method accepts on a layout."""
        return 1

    @classmethod
    def for_budget(cls, shapes: Mapping[str, tuple[int, int]], budget: int, r: int) -> Budget:
        """The rank, d and hyperparameters whose count of trained numbers is nearest to `budget`.

        shapes: (out_features, in_features) of every adapted module. Methods with a free d meet it exactly.
        """
        layout = LoRALayout.from_shapes(shapes, r)
        d = min(max(budget, cls.min_d(layout)), layout.D)
        return Budget(r=r, d=d, trained=d)

    @classmethod
    def parameter_shapes(cls, layout: LoRALayout, d: int, **hyperparameters: Any) -> Mapping[str, Sequence[int]] | None:
        """The shapes of P's own Parameters by name, without making P; None where only making it tells them.

        A file that lacks their numbers is then refused before P is made.
        """
        return None if cls.learned else {}

    @classmethod
    def draws(cls, layout: LoRALayout, d: int, **hyperparameters: Any) -> int:
        """How many random numbers are drawn for P; 0 where it is a small multiple of D + d and the Parameters of P.

        A file that asks for more than `limits.draws` is refused before P is made.
        """
        return 0

    # ---- what every method gets --------------------------------------------------------------------

    @property
    def D(self) -> int:
        return self.layout.D

    @property
    def shape(self) -> tuple[int, int]:
        return self.D, self.d

    @property
    def device(self) -> torch.device:
        """Where P's numbers are; the CPU for a P without any."""
        parts = (m for m in self.modules() if isinstance(m, Projection))
        own = (t for part in parts for t in part.constants().values())
        return next((t.device for t in chain(own, self.parameters())), torch.device("cpu"))

    @property
    def trained(self) -> int:
        """Count of trained numbers: d and P's own Parameters."""
        return self.d + sum(p.numel() for p in self.parameters())

    def matvec(self, theta_d: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """P theta_d without c: (..., d) -> (..., D), outside autograd for linear methods."""
        self._check(theta_d, "theta_d", "d", self.d)
        return self._batched(self._matvec, theta_d, self.D, dtype or theta_d.dtype)

    def rmatvec(self, theta_D: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """P^T theta_D: (..., D) -> (..., d), outside autograd for linear methods."""
        self._check(theta_D, "theta_D", "D", self.D)
        return self._batched(self._rmatvec, theta_D, self.d, dtype or theta_D.dtype)

    def forward(self, theta_d: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """theta_D = P theta_d + c: (..., d) -> (..., D), in theta_d's dtype or `dtype`; differentiable to any order."""
        self._refuse_undeclared()
        c = self.offset
        # a sum with c is rounded to a narrower dtype once, at the end
        first = dtype if c is None else torch.promote_types(theta_d.dtype, dtype or theta_d.dtype)
        theta_D = _apply_map(self, theta_d, False, first)
        return theta_D if c is None else (theta_D + c.to(theta_D.dtype)).to(dtype or theta_D.dtype)

    def adjoint(self, theta_D: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """P^T theta_D: (..., D) -> (..., d); differentiable to any order. It is the backward of `forward`."""
        self._refuse_undeclared()
        return _apply_map(self, theta_D, True, dtype)

    def at_rows(self, theta_d: Tensor, rows: Tensor) -> Tensor:
        """(P theta_d + c)[rows]: theta_d (d,), rows (m,) int64. Methods that can compute only these override it."""
        return self(theta_d)[rows.to(theta_d.device)]

    def _refuse_undeclared(self) -> None:
        if not (self._parameters or self._modules or self._buffers):
            return
        if not self.learned and torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            names = ", ".join(name for name, p in self.named_parameters() if p.requires_grad)
            raise ProjectionError(
                f"{self.name}: P holds Parameters ({names}), but `learned` is False, so they would get no gradient. "
                "Set learned = True and write _matvec in differentiable torch code, or hold them as plain tensors."
            )
        if inside := [name for name, _ in self.named_buffers()]:
            raise ProjectionError(
                f"{self.name}: P's own numbers must be tensors of a Projection, got the buffer {inside[0]} of a module "
                "inside P, which averages, casts and state dicts would change. Keep it as an attribute of P."
            )

    def _check(self, x: Tensor, what: str, size: str, n: int) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ProjectionError(f"{self.name}: {what} must be a float tensor, got {got}. Convert it first.")
        if x.ndim == 0 or x.shape[-1] != n:
            raise ProjectionError(
                f"{self.name}: {what} must have shape (..., {size}) = (..., {n}), got {tuple(x.shape)}. "
                f"P has shape (D, d) = {self.shape}; theta_d goes in forward, theta_D in adjoint."
            )

    def _batched(self, raw: Callable[..., Tensor], x: Tensor, m: int, dtype: torch.dtype) -> Tensor:
        """(..., n) -> (..., m) in `dtype` by the raw map (batch, n) -> (batch, m), in float32 or float64."""
        if x.numel() == 0:
            return x.to(dtype).sum(-1, keepdim=True).expand(*x.shape[:-1], m)  # nothing, with a gradient
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        more = (dtype,) if self.casts else ()
        if not self.casts:
            rows = rows.to(torch.float64 if torch.float64 in (x.dtype, dtype) else torch.float32)
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                y = raw(rows, *more)
        else:
            y = raw(rows, *more)
        return y.to(dtype).reshape(*x.shape[:-1], m)

    def _in_full(self) -> Projection:
        """P, or on a device without float64 a copy of it on the CPU, where it has its own bits again."""
        return self if widest(self.device) == torch.float64 else copy.deepcopy(self).cpu()

    @_in_float64
    def to_dense(self) -> Tensor:
        """P itself, (D, d) float64, on P's device, or on the CPU where that has no float64."""
        rows, columns, values = self.entries()
        P = torch.zeros(self.shape, dtype=torch.float64, device=values.device)
        return P.index_put_((rows, columns), values.detach(), accumulate=True)

    def to_sparse(self) -> Tensor:
        """P as a torch CSR tensor, (D, d) float64. Raises ProjectionError where P is dense."""
        rows, columns, values = self.entries()
        place = torch.stack([rows, columns])
        P = torch.sparse_coo_tensor(place, values.detach(), self.shape, check_invariants=False)
        return P.to_sparse_csr()

    def to_scipy(self) -> LinearOperator:
        """P as a SciPy LinearOperator in float64, for svds, lsmr, onenormest and the like; complex vectors as well."""
        P = self._in_full()

        def apply(raw: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
            @torch.no_grad()
            def on_columns(x: np.ndarray) -> np.ndarray:
                if np.iscomplexobj(x):
                    return on_columns(x.real) + 1j * on_columns(x.imag)
                rows = torch.from_numpy(np.array(x.T, dtype=np.float64, order="C"))
                return raw(rows.to(P.device)).cpu().numpy().T

            return on_columns

        forward, adjoint = apply(P.matvec), apply(P.rmatvec)
        return LinearOperator(self.shape, forward, adjoint, forward, np.float64, adjoint)  # type: ignore[call-arg]

    def rebuild(self, **changes: Any) -> Projection:
        """A fresh projection from the same arguments, some of them changed (`seed=1`).

        Raises ProjectionError for a method made of base weights, which P does not keep, unless they are given.
        """
        arguments = {"layout": self.layout, "seed": self.seed, **self.hyperparameters, **changes}
        if self.free_d:
            arguments.setdefault("d", self.d)
        if self.needs_base_weights and "base_weights" not in arguments:
            raise ProjectionError(
                f"{self.name}: rebuild needs the base weights, which P does not keep, got none. Pass base_weights=."
            )
        return type(self)(**arguments)

    def checksum(self) -> str:
        """SHA-256 of (name, version, shape) and of theta_D at a fixed theta_d, on at most 1024 rows.

        Computed in float64 and rounded to multiples of 2^-16, so it does not depend on the device; of a P on a device
        without float64, by a copy on the CPU.
        """
        if (exact := self._in_full()) is not self:
            return exact.checksum()
        count = min(self.D, _CHECKSUM_ROWS)
        rows = torch.arange(count) * (self.D - 1) // max(count - 1, 1)
        with torch.no_grad():
            values = self.at_rows(uniform(0, "checksum", self.d).to(self.device), rows).cpu()
        grid = torch.round(values / _CHECKSUM_GRID).long()
        head = f"{self.name}/{self.version}/{self.shape}/".encode()
        return hashlib.sha256(head + grid.numpy().astype("<i8").tobytes()).hexdigest()

    def constants(self) -> dict[str, Tensor]:
        """P's own numbers, by the names of the attributes that hold them, without those of its parts."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Keep a number of P in `constants`: as a buffer it would be averaged with the weights by SWA and EMA.

        It is part of no state dict, as P is rebuilt from its arguments.
        """
        object.__setattr__(self, name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Projection:
        """Move P without rounding it: `.to(bfloat16)` and `.half()` leave the dtype of its constants alone.

        On a device without float64 they are rounded once to float32; moved back, P has its own bits again.
        """
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, constant in self.constants().items():
            object.__setattr__(self, name, self._moved(fn, name, constant))
        return self

    def _moved(self, fn: Callable[[Tensor], Tensor], name: str, constant: Tensor) -> Tensor:
        exact = self._exact.pop(name, constant)
        device = fn(torch.empty(0, device=constant.device)).device
        if exact.dtype == torch.float64 and widest(device) != torch.float64:
            self._exact[name] = exact
            return exact.float().to(device)
        if exact is not constant:
            return exact.to(device)
        moved = fn(constant)
        return moved if moved.dtype == constant.dtype else constant.to(moved.device)

    def extra_repr(self) -> str:
        return f"{self.name}, D={self.D}, d={self.d}, seed={self.seed}"
