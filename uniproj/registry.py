"""Names of projections: every file of `uniproj/projections/` without a leading underscore, and every entry point of the
group `uniproj.projections`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, get_type_hints

import numpy as np
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from uniproj.claims import refuse_unknown
from uniproj.errors import ProjectionError, shown, unknown
from uniproj.layout import LoRALayout
from uniproj.plugins import discover
from uniproj.projection import Projection

ENTRY_POINTS = "uniproj.projections"
_classes: dict[str, type[Projection]] = {}
P = TypeVar("P", bound=type[Projection])


def register(name: str) -> Callable[[P], P]:
    """Class decorator that gives a Projection its name.

    Raises ProjectionError if the name belongs to another class, for a claim that nothing decides, and where there is no
    variant that could be tried.
    """

    def decorate(cls: P) -> P:
        known = _classes.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ProjectionError(
                f"register: the name {name!r} is taken by {known.__module__}.{known.__qualname__}. Choose another."
            )
        if not cls.variants:
            raise ProjectionError(
                f"register: `variants` of {name} must hold one choice at least, got none. Leave it out."
            )
        cls.name = name
        refuse_unknown(cls)
        _classes[name] = cls
        return cls

    return decorate


@cache
def _load() -> None:
    discover("uniproj.projections", ENTRY_POINTS, register)


def names() -> list[str]:
    """Every known name, sorted."""
    _load()
    return sorted(_classes)


def get(name: str) -> type[Projection]:
    """The class of a name. Raises ProjectionError with the nearest known names for an unknown one."""
    _load()
    if name not in _classes:
        raise ProjectionError(
            f"{unknown('projection', name, _classes)} One of your own is known once its file is imported; commands do "
            "that by --plugins FILE."
        )
    return _classes[name]


def _integer(name: str, what: str, value: Any) -> Any:
    """An int from anything that is one (NumPy's too), None as it is."""
    try:
        return None if value is None else operator.index(value)
    except TypeError:
        raise ProjectionError(f"{name}: {what} must be an integer, got {value!r}.") from None


_STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
_LARGEST = torch.finfo(torch.float32).max


def _types(cls: type[Projection]) -> dict[str, Any]:
    """The types that the class annotates its hyperparameters with, by their names."""
    try:
        hints = get_type_hints(cls.__init__)
    except NameError:  # names that a class imports for type checkers alone
        hints = dict.fromkeys(cls.__init__.__annotations__, Any)
    return {name: hint for name, hint in hints.items() if name not in ("layout", "d", "seed", "return")}


def _hyperparameters(cls: type[Projection], types: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What is given, NumPy's numbers as Python's. Raises ProjectionError for a value of another type than the class
    says, and for numbers beyond float32."""
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in given.items()}
    for name, value in plain.items():
        # base weights may be loaded one by one as the method reads them
        if name not in types or name == "base_weights":
            continue
        try:
            TypeAdapter(types[name], config=_STRICT).validate_python(value)
        except ValidationError:
            kind = getattr(types[name], "__name__", str(types[name]))
            raise ProjectionError(
                f"{cls.name}: {name} must be of type {kind}, its numbers finite, got {shown(value)}. Correct it."
            ) from None
        if isinstance(value, float) and abs(value) > _LARGEST:
            raise ProjectionError(f"{cls.name}: {name} must be at most {_LARGEST:.1e} in size, got {value}. Lower it.")
    return plain


def build(
    name: str,
    D: int | None = None,
    d: int | None = None,
    *,
    layout: LoRALayout | None = None,
    seed: int = 0,
    **hyperparameters: Any,
) -> Projection:
    """The projection of this name, on `layout` or on D coordinates without module structure.

    d is needed where the method leaves it free and refused where it contradicts the one that the layout
    and the hyperparameters decide. Unknown hyperparameters, and values of other types than the method's signature says,
    are errors (ProjectionError).
    """
    cls = get(name)
    if (D is None) == (layout is None):
        raise ProjectionError(f"{name}: pass either D= or layout=, got D={D} and layout={layout}.")
    D, d, seed = _integer(name, "D", D), _integer(name, "d", d), _integer(name, "seed", seed)
    if not 0 <= seed < 2**64:
        raise ProjectionError(f"{name}: seed must lie in [0, 2^64), got {shown(seed)}.")
    layout = layout if layout is not None else LoRALayout.flat(D)
    if cls.free_d and d is None:
        raise ProjectionError(f"{name}: d is free for this method, pass d= (1 <= d <= D = {layout.D}).")
    types = _types(cls)
    size, options = {"d": d} if cls.free_d else {}, _hyperparameters(cls, types, hyperparameters)
    # on the CPU whatever the default device; tensors made in inference mode could not be trained with
    try:
        with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
            projection: Projection = cls(layout, **size, seed=seed, **options)  # type: ignore[arg-type]
    except TypeError as error:
        if odd := sorted(hyperparameters.keys() - types.keys()):
            known = [*types] or "none"
            raise ProjectionError(f"{name}: unknown hyperparameters {odd}; this method knows {known}.") from error
        raise
    except ValueError as error:
        # of our own methods only kernels raise it, which know no method's name
        if isinstance(error, ProjectionError) or not cls.__module__.startswith("uniproj."):
            raise
        raise ProjectionError(f"{name}: {error}") from error
    if d is not None and projection.d != d:
        raise ProjectionError(f"{name}: d = {cls.d_formula} = {projection.d} on this layout, got d={d}. Leave d out.")
    return projection
