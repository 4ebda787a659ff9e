"""Does an adapter fit a model? The first difference between two layouts, and what to do about it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import chain
from typing import Any

from uniproj.errors import AdapterError, printable
from uniproj.format.header import Header, quantisation
from uniproj.format.remap import Table, new_names, suggestion
from uniproj.layout import LoRALayout


def check_layout(header: Header, found: LoRALayout, table: Table = ()) -> dict[str, str]:
    """{module of the saved layout: module of this model}.

    found: the layout of the model's modules, under the model's names. Raises AdapterError with the first module that
    is missing, renamed, left over, or of another shape or rank.
    """
    names = new_names(header.layout, table)
    has, wants = _sizes(found), {names[m]: size for m, size in _sizes(header.layout).items()}
    differs = _difference(wants, has)
    if differs is None:
        return names
    said = f"{header.projection}: the adapter was trained with other modules, shapes or ranks: "
    remedy = f"Load the adapter on {header.base_model or 'the base model it was trained on'}"
    extra = [module for module in has if module not in wants]
    if differs.found is None:
        missing = [module for module in wants if module not in has]
        raise AdapterError(said + _about_missing(missing, extra, wants, has))
    if differs.wanted is None:
        raise AdapterError(f"{said}this model has {extra[0]} besides, and {len(extra) - 1} more. {remedy}.")
    (out, in_, r, *more), (out_now, in_now, r_now, *more_now) = differs.wanted, differs.found
    what, old, now = "out, in", [out, in_, *more], [out_now, in_now, *more_now]
    if old == now:
        what, old, now = "rank", [r], [r_now]
    elif more or more_now:
        what = "out, in, and count or axes"
    raise AdapterError(
        f"{said}{differs.module} must have ({what}) = ({', '.join(map(str, old))}), got ({', '.join(map(str, now))}). "
        f"{remedy}, with the ranks of its configuration."
    )


def warn_of_another_base(header: Header, name: str | None, of_base: Any) -> None:
    """One warning where the same architecture has another name, revision or quantisation than in training.

    of_base: the model's configuration.
    """
    pairs = {
        "base model": (header.base_model, name),
        "revision": (header.base_revision, getattr(of_base, "_commit_hash", None)),
    }
    quantised = quantisation(of_base)
    changed = [f"{what} {old} (now {new})" for what, (old, new) in pairs.items() if old and new and old != new]
    if header.base_quantisation != quantised:
        old, new = header.base_quantisation or "none", quantised or "none"
        changed.append(f"quantisation {old} (now {new})")
    if changed:
        warnings.warn(f"{header.projection}: the adapter was trained on {printable(', '.join(changed))}.", stacklevel=2)


_Size = tuple[Any, ...]  # out, in, rank, and count and axes where there are any


@dataclass(frozen=True)
class Difference:
    """The first site in which two layouts differ, with its (out, in, rank) in each of them, or None."""

    module: str
    wanted: _Size | None
    found: _Size | None

    def __str__(self) -> str:
        sizes = (self.wanted, self.found)
        wanted, found = ("no adapter" if x is None else f"(out, in, rank{', ..' * (len(x) > 3)}) = {x}" for x in sizes)
        return f"{self.module} must have {wanted}, got {found}"


def first_difference(wanted: LoRALayout, found: LoRALayout) -> Difference | None:
    """What is missing comes first, then what is left over, then other sizes."""
    return _difference(_sizes(wanted), _sizes(found))


def _difference(wants: dict[str, _Size], has: dict[str, _Size]) -> Difference | None:
    missing, extra = (m for m in wants if m not in has), (m for m in has if m not in wants)
    first = next(chain(missing, extra, (m for m in wants if wants[m] != has.get(m))), None)
    return None if first is None else Difference(first, wants.get(first), has.get(first))


def _sizes(layout: LoRALayout) -> dict[str, _Size]:
    return {site.name: tuple(site.row[1:]) for site in layout.sites}


def _about_missing(missing: list[str], extra: list[str], wants: dict, has: dict) -> str:
    first = missing[0]
    if row := suggestion(missing, extra):
        return (
            f"{first} is missing, and {len(missing)} such modules seem to be renamed. If they are the same, load by "
            f"PeftModel.from_pretrained with remap={{{row[0]!r}: {row[1]!r}}} (on the command line --remap "
            f"{row[0]}={row[1]})."
        )
    same = next((m for m in extra if has[m] == wants[first]), None)
    hint = f", and has {same} of the same size, which the adapter does not know" if same else ""
    return (
        f"{first} is missing in this model{hint}. Load the adapter on the base model it was trained on, or, for "
        "renamed modules, pass PeftModel.from_pretrained the table remap={'old': 'new'} (on the command line --remap "
        "old=new)."
    )
