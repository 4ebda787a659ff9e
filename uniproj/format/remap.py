"""Modules that were renamed since an adapter was saved: P stays on the old names, its blocks go to the new ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from uniproj.errors import AdapterError
from uniproj.format.patterns import of_sites
from uniproj.layout import LoRALayout

# (old, new): the first run of whole components equal to `old` becomes `new`; one after the other
Table = Sequence[Sequence[str]]

# limit on the letters of all rows times the modules, which bounds memory and time; each row counts as so many letters
# more, as even an empty one takes time
LETTERS, _OF_A_ROW = 2**28, 64


def renamed(name: str, table: Table) -> str:
    """A module's name after the table: [("attention.self", "attn")] makes `layer.0.attn.query` of the old name."""
    for old, new in table:
        whole, run = f".{name}.", f".{old}."
        if (start := whole.find(run)) >= 0:
            name = f"{whole[: start + 1]}{new}{whole[start + len(run) - 1 :]}"
        name = name.replace("..", ".").strip(".")
    return name


def new_names(layout: LoRALayout, table: Table) -> dict[str, str]:
    """{name of a site in the layout: name now}.

    Raises AdapterError for a row that is no pair, for two modules of one new name, and for a table beyond `LETTERS`.
    """
    for row in table:
        if len(row) != 2 or not row[0] or not all(isinstance(part, str) for part in row):
            raise AdapterError(f"remap: each row must be a pair old=new of parts of names, got {row!r}. Correct it.")
    letters = sum(_OF_A_ROW + len(old) + len(new) for old, new in table)
    if letters * len(layout.modules) > LETTERS:
        raise AdapterError(
            f"remap: rows times modules must be few, at most {LETTERS:,} letters, got {len(table):,} rows of "
            f"{letters:,} letters for {len(layout.modules):,} modules. Rename by parts that many names share."
        )
    now = {site.name: renamed(site.name, table) for site in layout.sites}
    modules = (m for site in layout.sites for m in replace(site, name=now[site.name]).modules)
    for first, second in pairwise(sorted(modules)):
        if first == second:
            raise AdapterError(f"remap: every module must get a name of its own, got {first} twice. Correct the table.")
    return now


def rename(config: Mapping[str, Any], layout: LoRALayout, table: Table) -> dict[str, Any]:
    """The fields of a configuration that fits the renamed modules: each one is named in full, with its rank and alpha.

    `layout` has the names of the saved P; the rows of `table` follow those that `config` holds already. Raises
    AdapterError for a row that fits no module.
    """
    rows = config.get("remap") or []
    before, now = new_names(layout, rows), new_names(layout, [*rows, *table])
    heads = config.get("modules_to_save") or []
    _check_used(table, [*before.values(), *heads])
    # the output projection of an attention comes with it
    sites = [site for site in layout.sites if site.name.rpartition(".")[0] not in before]
    ends = tuple(f".{target}" for target in config.get("target_parameters") or ())
    parameters = [now[site.name] for site in sites if f".{before[site.name]}".endswith(ends)]
    fields = {**config, "remap": [*rows, *map(list, table)], "target_parameters": parameters or None}
    fields["target_modules"] = [now[site.name] for site in sites if now[site.name] not in parameters]
    fields |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    for field, default in (("rank_pattern", config.get("r")), ("alpha_pattern", config.get("lora_alpha"))):
        values = of_sites(field, config.get(field), before.values(), default)
        own = {re.escape(now[site.name]): values[before[site.name]] for site in sites}
        fields[field] = {pattern: value for pattern, value in own.items() if value != default}
    if heads:
        fields["modules_to_save"] = [renamed(name, table) for name in heads]
    return fields


def _check_used(table: Table, names: list[str]) -> None:
    for row in table:
        after = [renamed(name, [row]) for name in names]
        if after == names:
            raise AdapterError(
                f"remap: {row[0]!r} must be a run of whole components of a saved module's name, got none that has it; "
                f"the first is {names[0]}. Correct the table."
            )
        names = after


def suggestion(missing: Iterable[str], extra: Iterable[str]) -> tuple[str, str] | None:
    """The one row that makes the missing names out of the extra ones, or None where no single row does."""
    old, new = list(missing), set(extra)
    for candidate in new if len(old) == len(new) else ():
        row = _differing_run(old[0], candidate)
        if row and all(renamed(name, [row]) in new for name in old) and {renamed(name, [row]) for name in old} == new:
            return row
    return None


def _differing_run(old: str, new: str) -> tuple[str, str] | None:
    """What is left of two names without their common first and last components; the old part is never empty."""
    a, b = old.split("."), new.split(".")
    first = 0
    while first < min(len(a), len(b)) and a[first] == b[first]:
        first += 1
    last = 0
    while last < min(len(a), len(b)) - first and a[-1 - last] == b[-1 - last]:
        last += 1
    if len(a) - last == first:  # only added components: keep one neighbour
        first, last = (first, last - 1) if last else (first - 1, last)
    if first < 0 or last < 0:
        return None
    return ".".join(a[first : len(a) - last]), ".".join(b[first : len(b) - last])
