"""Modules that were renamed since an adapter was saved: P stays on the old names, its blocks go to the new ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from uniproj.adapters.patterns import of_modules
from uniproj.errors import AdapterError
from uniproj.layout import LoRALayout

if TYPE_CHECKING:
    from uniproj.tuner.config import UniProjConfig

# (old, new): the first run of whole components equal to `old` becomes `new`; one after the other
Table = Sequence[Sequence[str]]

# of all rows, each written once for every module: names take no more memory, nor their making more than seconds. A row
# counts as so many letters more, as it takes time even where it has none
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
    """{name in the layout: name now}.

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
    now = {module: renamed(module, table) for module in layout.modules}
    for first, second in pairwise(sorted(now.values())):
        if first == second:
            raise AdapterError(f"remap: every module must get a name of its own, got {first} twice. Correct the table.")
    return now


def rename(config: UniProjConfig, layout: LoRALayout, table: Table) -> None:
    """Make a configuration fit the renamed modules: each one is named in full, with its rank and alpha.

    `layout` has the names of the saved P; the rows of `table` follow those that `config.remap` holds already. Raises
    AdapterError for a row that fits no module.
    """
    before = new_names(layout, config.remap or [])
    now = new_names(layout, [*(config.remap or []), *table])
    _check_used(table, [*before.values(), *(config.modules_to_save or [])])
    ranks = {now[b.module]: b.shape[1] for b, _ in layout.pairs()}
    if config.alpha_pattern:
        alphas = of_modules("alpha_pattern", config.alpha_pattern, before.values(), config.lora_alpha)
        own = {re.escape(now[m]): alphas[before[m]] for m in now}
        config.alpha_pattern = {m: alpha for m, alpha in own.items() if alpha != config.lora_alpha}
    config.rank_pattern = {re.escape(module): r for module, r in ranks.items() if r != config.r}
    config.target_modules = set(now.values())
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    if config.modules_to_save:
        config.modules_to_save = [renamed(name, table) for name in config.modules_to_save]
    config.remap = [*(config.remap or []), *(list(row) for row in table)]


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
