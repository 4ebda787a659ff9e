"""The layout of theta_D: which entry of the flat vector is which entry of which LoRA factor."""

from __future__ import annotations

import hashlib
import json
import math
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from uniproj.errors import ProjectionError

Factor = Literal["B", "A"]
# (out, in) of one module, or (out, in, count) of a stack of them
Sizes = tuple[int, int] | tuple[int, int, int]


@dataclass(frozen=True)
class Block:
    """One LoRA factor: theta_D[offset : offset + numel] is the row-major matrix of this shape.

    `factor` is "B" with shape (out, r) or "A" with shape (r, in).
    """

    module: str
    factor: Factor
    shape: tuple[int, int]
    offset: int

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def rows(self) -> slice:
        return slice(self.offset, self.offset + self.numel)


@dataclass(frozen=True)
class Site:
    """What has one name in a model: a module, or a stack of `count` modules of one size, such as the experts that are
    one parameter of the model. Those of a stack are called `name.0`, `name.1`, .. in the layout.

    axes: of the columns of W as the model has them, where W is no plain matrix there: (channels, kernel, ..) of a
    convolution, none of an embedding, whose W lies transposed.
    """

    name: str
    out_features: int
    in_features: int
    r: int
    count: int | None = None
    axes: tuple[int, ...] | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        return (self.name,) if self.count is None else tuple(f"{self.name}.{i}" for i in range(self.count))

    @property
    def rank(self) -> int:
        """The rank of a configuration, which its scale is made of: a convolution parts it among its groups."""
        return self.r if self.axes is None else self.r * (self.count or 1)

    @property
    def is_plain(self) -> bool:
        return self.count is None and self.axes is None

    @property
    def row(self) -> list[Any]:
        """All of it, as JSON has it: [name, out, in, r], then count and axes where there are any."""
        axes = None if self.axes is None else list(self.axes)
        values = (self.name, self.out_features, self.in_features, self.r, self.count, axes)
        return [value for value in values if value is not None]

    @property
    def numel(self) -> int:
        return (self.out_features + self.in_features) * self.r * (self.count or 1)


_NUMBER = re.compile(r"\d+")


def _natural(name: str) -> tuple[str, str]:
    """Sort key in which layer 2 comes before layer 10, and a number before text; the name breaks ties such as 1, 01."""
    return _NUMBER.sub(_sortable, name), name


def _sortable(number: re.Match[str]) -> str:
    """Text that sorts as the number does: its beginning comes before every letter, then the shorter number first."""
    digits = str(int(number[0]))
    return f"\0{chr(len(digits))}{digits}"


def _site(name: str, sizes: Sizes, r: int, axes: tuple[int, ...] | None) -> Site:
    out_features, in_features, *count = map(operator.index, sizes)
    (n,) = count or (None,)
    return Site(name, out_features, in_features, operator.index(r), n, axes)


_MOST_AXES = 4  # of a convolution in three dimensions
_LETTERS = 2**24  # as many as a file that names 131,072 modules one by one may have (`uniproj.limits`)
_ROWS = [[str, int, int, int, *more] for more in ([], [int], [list], [int, list])]


def _of_row(row: list[Any]) -> Site:
    """The inverse of `Site.row`. Raises TypeError for other types."""
    if [*map(type, row)] not in _ROWS:
        raise TypeError("got other types")
    count = next((value for value in row[4:] if isinstance(value, int)), None)
    axes = next((tuple(value) for value in row[4:] if isinstance(value, list)), None)
    if {*map(type, axes or ())} - {int} or len(axes or ()) > _MOST_AXES:
        raise TypeError("got other axes")
    name, out_features, in_features, r = row[:4]
    return Site(name, out_features, in_features, r, count, axes)


class LoRALayout:
    """theta_D = concat over modules, in natural order of their *names*, of [vec(B), vec(A)], row-major.

    The order of registration never matters, so the same names and shapes give the same layout in every
    library version; `fingerprint` is the SHA-256 of names, shapes and order.

    Raises ProjectionError for an empty layout or a shape or rank below 1.
    """

    def __init__(self, blocks: Iterable[Block], sites: Iterable[Site] = ()):
        """sites: those that are more than a plain matrix: a stack has the modules `name.0`, .., `name.(count - 1)`."""
        self.blocks = tuple(blocks)
        self._special = {site.modules[0]: site for site in sites}
        if not self.blocks:
            raise ProjectionError("LoRALayout: a layout needs at least one block, got none. Check target_modules.")
        end = 0
        for block in self.blocks:
            if block.offset != end:
                raise ProjectionError(
                    "LoRALayout: blocks must follow one another without gap or overlap. Use from_shapes."
                )
            end += block.numel
        self.D = end
        self.sites = self._found_sites()
        pairs = ([s.numel] if s.count else [s.out_features * s.r, s.r * s.in_features] for s in self.sites)
        self._cuts = [numel for pair in pairs for numel in pair]

    def _found_sites(self) -> tuple[Site, ...]:
        """The modules, with those of a stack as one; none on a flat layout."""
        found, blocks = [], iter(self.blocks if len(self.blocks) > 1 else ())
        for b, a in zip(blocks, blocks, strict=True):
            site = self._special.get(b.module) or Site(b.module, b.shape[0], a.shape[1], b.shape[1])
            found.append(site)
            for _ in range(2 * (len(site.modules) - 1)):
                next(blocks)
        return tuple(found)

    @classmethod
    def from_shapes(
        cls,
        shapes: Mapping[str, Sizes],
        r: int | Mapping[str, int],
        axes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> LoRALayout:
        """Layout for modules of (out_features, in_features), or stacks of (out_features, in_features, count), at one
        rank or one rank per name; axes: of those that have some, see `Site`."""
        ranks = r if isinstance(r, Mapping) else dict.fromkeys(shapes, r)
        return cls.of_sites(_site(name, shapes[name], ranks[name], (axes or {}).get(name)) for name in shapes)

    @classmethod
    def of_sites(cls, sites: Iterable[Site]) -> LoRALayout:
        """Layout for sites, which may come in any order."""
        sites = list(sites)
        try:
            ordered = sorted(sites, key=lambda site: _natural(site.name if site.count is None else f"{site.name}.0"))
        except ValueError:  # Python's own bound
            raise ProjectionError("LoRALayout: a number in a name must have at most 4,300 digits. Rename it.") from None
        layout = cls._of_sites(ordered)
        if layout._special:
            layout._check_order()  # a module may bear the name of one within a stack
        return layout

    @classmethod
    def _of_sites(cls, sites: Iterable[Site]) -> LoRALayout:
        """Of sites in the order of the layout."""
        blocks: list[Block] = []
        special: list[Site] = []
        offset = 0
        for site in sites:
            name, out_features, in_features, r, count, axes = astuple(site)
            if min(out_features, in_features, r, 1 if count is None else count) < 1:
                of_stack = "" if count is None else f", count={count}"
                raise ProjectionError(
                    f"LoRALayout: {name} must have sizes and rank of at least 1, "
                    f"got out={out_features}, in={in_features}, r={r}{of_stack}."
                )
            if axes and (min(axes) < 1 or math.prod(axes) != in_features):
                raise ProjectionError(
                    f"LoRALayout: {name} must have axes whose product is in={in_features}, got {axes}."
                )
            if not site.is_plain:
                special.append(site)
            for module in site.modules:
                blocks.append(Block(module, "B", (out_features, r), offset))
                offset += out_features * r
                blocks.append(Block(module, "A", (r, in_features), offset))
                offset += r * in_features
        return cls(blocks, special)

    def _check_order(self) -> None:
        """Raises ProjectionError where modules do not stand once each, in natural order of their names."""
        for before, after in pairwise(block.module for block in self.blocks[::2]):
            if _natural(before) >= _natural(after):
                raise ProjectionError(
                    f"LoRALayout: modules must stand once each, in natural order of their names: expected {after}, "
                    f"got {before}{' twice' if before == after else ''}."
                )

    @classmethod
    def flat(cls, D: int) -> LoRALayout:
        """D coordinates without module structure: a single 1 x D block."""
        try:
            D = operator.index(D)
        except TypeError:
            raise ProjectionError(f"LoRALayout: D must be an integer, got {D!r}. Round it.") from None
        if D < 1:
            raise ProjectionError(f"LoRALayout: D must be at least 1, got {D}.")
        return cls([Block("", "A", (1, D), 0)])

    @property
    def is_flat(self) -> bool:
        return len(self.blocks) == 1

    @cached_property
    def modules(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(block.module for block in self.blocks))

    @cached_property
    def site_of(self) -> dict[str, str]:
        """{module: the name of its site}, which is another for those of a stack; empty on a flat layout."""
        return {module: site.name for site in self.sites for module in site.modules}

    def to_json(self) -> str:
        """The rows of the sites in order, see `Site.row`; inverse of `from_json`."""
        return json.dumps([site.row for site in self.sites], separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> LoRALayout:
        """The layout that `to_json` wrote. Raises ProjectionError for anything else, and for modules out of order."""
        try:
            rows = json.loads(text)
            sites = [_of_row(row) for row in rows]
            if json.dumps(rows, separators=(",", ":")) != text:  # before anything as large as a count is made
                raise ProjectionError("LoRALayout: the text must be as to_json writes it.")
            letters = sum(len(site.name) * (site.count or 0) for site in sites)  # each module bears the name
            if letters > _LETTERS:
                raise ProjectionError(
                    f"LoRALayout: the modules of stacks must have names of at most {_LETTERS:,} letters in all, got "
                    f"{letters:,}. Shorten them."
                )
            layout = cls._of_sites(sites)
            layout._check_order()
        except ProjectionError:
            raise
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise ProjectionError(f"LoRALayout: modules must be rows [module, out, in, r], {error}.") from None
        return layout

    @cached_property
    def fingerprint(self) -> str:
        text = json.dumps([[b.module, b.factor, *b.shape] for b in self.blocks], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def block(self, module: str, factor: Factor) -> Block:
        return self._index[module, factor]

    @cached_property
    def _index(self) -> dict[tuple[str, Factor], Block]:
        return {(block.module, block.factor): block for block in self.blocks}

    def pairs(self) -> list[tuple[Block, Block]]:
        """(B, A) of every module. Raises ProjectionError on a flat layout, which has no pairs."""
        if self.is_flat:
            raise ProjectionError("LoRALayout: a flat layout has no modules. Pass layout= instead of D=.")
        return [(self.block(m, "B"), self.block(m, "A")) for m in self.modules]

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of every module."""
        return {b.module: (b.shape[0], a.shape[1]) for b, a in self.pairs()}

    def module_index(self) -> Tensor:
        """(D,) int64: the position in `modules` of the module that owns each row."""
        position = {m: i for i, m in enumerate(self.modules)}
        sizes = torch.tensor([b.numel for b in self.blocks])
        return torch.repeat_interleave(torch.tensor([position[b.module] for b in self.blocks]), sizes)

    def rows(self, modules: Iterable[str]) -> Tensor:
        """The rows of theta_D that belong to these modules, int64, in the order of the layout."""
        wanted = set(modules)
        if unknown := wanted - set(self.modules):
            raise ProjectionError(f"LoRALayout: unknown modules {sorted(unknown)}; known: {list(self.modules)}.")
        return torch.cat([torch.arange(b.rows.start, b.rows.stop) for b in self.blocks if b.module in wanted])

    def restrict(self, modules: Iterable[str]) -> LoRALayout:
        """The layout of a subset of the modules, with offsets counted from 0. A stack of which some modules are missing
        is none any more."""
        wanted, offset, blocks = set(modules), 0, []
        for block in self.blocks:
            if block.module in wanted:
                blocks.append(Block(block.module, block.factor, block.shape, offset))
                offset += block.numel
        return LoRALayout(blocks, [site for site in self._special.values() if wanted.issuperset(site.modules)])

    def renamed(self, names: Mapping[str, str]) -> LoRALayout:
        """The same blocks, in the same order, under other names. names: {site: its new name}."""
        blocks, sites = iter(self.blocks), [replace(site, name=names[site.name]) for site in self.sites]
        modules = [module for site in sites for module in site.modules for _ in "BA"]
        renamed = [replace(block, module=module) for block, module in zip(blocks, modules, strict=True)]
        return LoRALayout(renamed, [site for site in sites if not site.is_plain])

    def split(self, theta_D: Tensor) -> list[Tensor]:
        """Views (..., rows, columns) of every block, through one autograd node. theta_D: (..., D)."""
        parts = theta_D.split([block.numel for block in self.blocks], dim=-1)
        return [part.unflatten(-1, block.shape) for part, block in zip(parts, self.blocks, strict=True)]

    def split_sites(self, theta_D: Tensor) -> list[Tensor]:
        """Views B (..., out, r) and A (..., r, in) of every site, one after the other, through one autograd node.

        Those of a stack are (..., count, out, r) and (..., count, r, in), through one node more. theta_D: (..., D).
        """
        parts, found = iter(theta_D.split(self._cuts, dim=-1)), []
        for site in self.sites:
            shapes = (site.out_features, site.r), (site.r, site.in_features)
            if site.count is None:
                pair: Iterable[Tensor] = (next(parts), next(parts))
            else:
                stack = next(parts).unflatten(-1, (site.count, -1))
                pair = stack.split([rows * columns for rows, columns in shapes], dim=-1)
            found += [part.unflatten(-1, shape) for part, shape in zip(pair, shapes, strict=True)]
        return found

    def flatten(self, factors: Mapping[tuple[str, Factor], Tensor]) -> Tensor:
        """theta_D from the matrices {(module, factor): (..., rows, columns)}; the inverse of `split`."""
        for block in self.blocks:
            if tuple(factors[block.module, block.factor].shape[-2:]) != block.shape:
                raise ProjectionError(
                    f"LoRALayout: {block.module}.{block.factor} must have shape {block.shape}, "
                    f"got {tuple(factors[block.module, block.factor].shape)}."
                )
        return torch.cat([factors[b.module, b.factor].flatten(-2) for b in self.blocks], dim=-1)

    def __eq__(self, other: object) -> bool:
        """Of the same blocks at the same sites; `fingerprint` is of the blocks alone, as P is."""
        return isinstance(other, LoRALayout) and (self.blocks, self.sites) == (other.blocks, other.sites)

    def __hash__(self) -> int:
        return hash((self.blocks, self.sites))

    def __repr__(self) -> str:
        return f"LoRALayout(D={self.D}, modules={len(self.modules)}, fingerprint={self.fingerprint[:12]})"
