"""What may be written in a settings file: values of the types that the fields of a dataclass name."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from experiments.errors import ExperimentError
from uniproj.errors import shown

_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
    Mapping: "a mapping",
    Sequence: "a list of values",
    Any: "null, text, true, false, a finite number, a list or a mapping",
}


def check_fields(where: str, kind: type, values: Mapping[str, Any]) -> None:
    """Raises ExperimentError unless each value is what the field of this name, in the dataclass `kind`, says."""
    hints = get_type_hints(kind)
    for name, value in values.items():
        check_type(f"{where}{name}", value, hints[name])


def check_record(where: str, kind: type, values: Mapping[str, Any]) -> None:
    """`check_fields` of what a program wrote: more keys than the dataclass has are another version's.

    Raises ExperimentError for a key that is not there, too, unless its field has a default.
    """
    known = {field.name: field for field in fields(kind)}
    for name, field in known.items():
        if name not in values and field.default is field.default_factory is MISSING:
            raise ExperimentError(f"{where}{name} must be there, got keys {', '.join(map(repr, values)) or 'none'}.")
    check_fields(where, kind, {name: value for name, value in values.items() if name in known})


def check_type(what: str, value: Any, hint: Any) -> None:
    """Raises ExperimentError unless `value`, and all that it holds, is of the type `hint`."""
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    found = next((option for option in options if _is(value, get_origin(option) or option)), None)
    if found is None:
        words = " or ".join(_WORDS.get(get_origin(option) or option, "a mapping") for option in options)
        raise ExperimentError(f"{what} must be {words}, got {shown(value)}. Correct the value.")
    if is_dataclass(found):
        check_record(f"{what}.", found, value)  # type: ignore[arg-type]
    elif isinstance(value, Mapping):
        _, item = get_args(found) or (str, Any)
        for key, held in value.items():
            check_type(f"{what}: the name {key!r}", key, str)
            check_type(f"{what}.{key}", held, item)
    elif _is(value, Sequence):
        (item,) = get_args(found) or (Any,)
        for i, held in enumerate(value):
            check_type(f"{what}[{i}]", held, item)


def _is(value: Any, kind: Any) -> bool:
    if kind is Any:
        return any(_is(value, each) for each in _WORDS if each is not Any)
    if is_dataclass(kind):
        return isinstance(value, Mapping)
    # True is an int to Python, and text is a sequence
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is Sequence:
        return isinstance(value, list | tuple)
    if kind in (int, float):
        # JSON and YAML write integers that no table can hold
        return isinstance(value, int | float if kind is float else int) and abs(value) <= sys.float_info.max
    return isinstance(value, kind)


def check_positive(where: str, values: Mapping[str, float], names: Collection[str]) -> None:
    """Raises ExperimentError if a value of one of these names is zero or below."""
    for name in names:
        if name in values and not values[name] > 0:
            raise ExperimentError(f"{where}{name} must be positive, got {values[name]}. Correct the value.")


def check_distinct(what: str, values: Sequence[Any]) -> None:
    """Raises ExperimentError for an empty list, or a value that stands in it twice."""
    if not values:
        raise ExperimentError(f"{what} must hold at least one value, got none. Add one.")
    if twice := [value for i, value in enumerate(values) if value in values[:i]]:
        raise ExperimentError(f"{what} must hold each value once, got {twice[0]!r} twice. Take one out.")
