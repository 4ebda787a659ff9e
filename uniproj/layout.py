"""The layout of theta_D: which entry of the flat vector is which entry of which LoRA factor."""

from __future__ import annotations

import hashlib
import json
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from uniproj.errors import ProjectionError

Factor = Literal["B", "A"]


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


_NUMBER = re.compile(r"\d+")


def _natural(name: str) -> tuple[str, str]:
    """Sort key in which layer 2 comes before layer 10, and a number before text; the name breaks ties such as 1, 01."""
    return _NUMBER.sub(_sortable, name), name


def _sortable(number: re.Match[str]) -> str:
    """Text that sorts as the number does: its beginning comes before every letter, then the shorter number first."""
    digits = str(int(number[0]))
    return f"\0{chr(len(digits))}{digits}"


class LoRALayout:
    """theta_D = concat over modules, in natural order of their *names*, of [vec(B), vec(A)], row-major.

    The order of registration never matters, so the same names and shapes give the same layout in every
    library version; `fingerprint` is the SHA-256 of names, shapes and order.

    Raises ProjectionError for an empty layout or a shape or rank below 1.
    """

    def __init__(self, blocks: Iterable[Block]):
        self.blocks = tuple(blocks)
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

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, int]], r: int | Mapping[str, int]) -> LoRALayout:
        """Layout for modules of (out_features, in_features), at one rank or one rank per module."""
        try:
            ordered = sorted(shapes, key=_natural)
        except ValueError:  # Python's own bound
            raise ProjectionError("LoRALayout: a number in a name must have at most 4,300 digits. Rename it.") from None
        return cls._of_rows([(name, *shapes[name], r[name] if isinstance(r, Mapping) else r) for name in ordered])

    @classmethod
    def _of_rows(cls, rows: Iterable[tuple[str, int, int, int]]) -> LoRALayout:
        """(module, out, in, r) in the order of the layout."""
        blocks: list[Block] = []
        offset = 0
        for name, *sizes in rows:
            out_features, in_features, rank = map(operator.index, sizes)
            if min(out_features, in_features, rank) < 1:
                raise ProjectionError(
                    f"LoRALayout: {name} must have sizes and rank of at least 1, "
                    f"got out={out_features}, in={in_features}, r={rank}."
                )
            blocks.append(Block(name, "B", (out_features, rank), offset))
            offset += out_features * rank
            blocks.append(Block(name, "A", (rank, in_features), offset))
            offset += rank * in_features
        return cls(blocks)

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

    def to_json(self) -> str:
        """The modules in order, `[[module, out, in, r], ...]`, each for its blocks B and A; inverse of `from_json`."""
        rows = [[b.module, b.shape[0], a.shape[1], b.shape[1]] for b, a in self.pairs()]
        return json.dumps(rows, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> LoRALayout:
        """The layout that `to_json` wrote. Raises ProjectionError for anything else, and for modules out of order."""
        try:
            rows = json.loads(text)
            if any([*map(type, row)] != [str, int, int, int] for row in rows):
                raise TypeError("got other types")
            order = [_natural(row[0]) for row in rows]
            layout = cls._of_rows(rows)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise ProjectionError(f"LoRALayout: modules must be rows [module, out, in, r], {error}.") from None
        if found := next(((before, after) for before, after in pairwise(order) if before >= after), None):
            (_, before), (_, after) = found
            raise ProjectionError(
                f"LoRALayout: modules must stand once each, in natural order of their names: expected {after}, "
                f"got {before}{' twice' if before == after else ''}."
            )
        if json.dumps(rows, separators=(",", ":")) != text:
            raise ProjectionError("LoRALayout: the text must be as to_json writes it.")
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
        """The layout of a subset of the modules, with offsets counted from 0."""
        wanted, offset, blocks = set(modules), 0, []
        for block in self.blocks:
            if block.module in wanted:
                blocks.append(Block(block.module, block.factor, block.shape, offset))
                offset += block.numel
        return LoRALayout(blocks)

    def split(self, theta_D: Tensor) -> list[Tensor]:
        """Views (..., rows, columns) of every block, through one autograd node. theta_D: (..., D)."""
        parts = theta_D.split([block.numel for block in self.blocks], dim=-1)
        return [part.unflatten(-1, block.shape) for part, block in zip(parts, self.blocks, strict=True)]

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
        return isinstance(other, LoRALayout) and self.blocks == other.blocks

    def __hash__(self) -> int:
        return hash(self.blocks)

    def __repr__(self) -> str:
        return f"LoRALayout(D={self.D}, modules={len(self.modules)}, fingerprint={self.fingerprint[:12]})"
