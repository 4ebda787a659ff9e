"""Tied-LoRA: factors shared within a group of modules, trained or frozen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uniproj.budget import Budget, nearest
from uniproj.errors import ProjectionError
from uniproj.layout import LoRALayout
from uniproj.projections._shared import SharedFactors
from uniproj.registry import register


@register("tied_lora")
class TiedLoRA(SharedFactors):
    r"""A and B shared by the modules of a group; each of u, v, A, B is trained or frozen.

    Maths:  delta W^l = diag(v^l) B diag(u^l) A. trained="ABuv" is the paper's best configuration, "AB" plain tying,
            "uv" VeRA's choice; every non-empty subset is allowed. One group per type of module (the last part
            of its name, for an expert of that of all its experts, group="type"), or one for all (group="all").
    Start:  A ~ U(+-1/sqrt(in)), frozen B ~ U(+-sqrt(6/r)), u = v = 1, and the first trained of B, v, A, u is 0.
    Claims: with only A, B trained and u = v = 1, P^T P = M I for M modules of equal shape.
    Source: Renduchintala et al. 2023, Tied-LoRA, arXiv 2311.09578, section 3.
    """

    formula = "B = diag(v) B_shared, A = diag(u) A_shared"
    d_formula = "[B] r out + [A] r in per group, [v] sum(out), [u] M r"
    source = "arXiv 2311.09578"
    learned = True
    claims = frozenset({"orthogonal"})
    claims_if = {
        "linear": ("B or v, and A or u, trained", lambda P: P.offset is None),
        "affine": ("one of the factors wholly frozen", lambda P: P.offset is not None),
    }
    variants = (
        {},
        {"trained": "AB"},
        {"trained": "ABu", "group": "all"},
        {"trained": "uv"},
        {"trained": "A"},
        {"trained": "Bv"},
    )

    @classmethod
    def parameter_shapes(cls, layout: LoRALayout, d: int, trained: str = "ABuv", **_: Any) -> dict[str, tuple[int]]:
        bilinear = {"v": "B", "u": "A"}
        numbers = {f: sum(b.shape[0] for b in layout.blocks if b.factor == f) for f in bilinear.values()}
        return {scaler: (numbers[f],) for scaler, f in bilinear.items() if {scaler, f} <= set(trained)}

    def __init__(self, layout: LoRALayout, seed: int = 0, *, trained: str = "ABuv", group: str = "type"):
        super().__init__(layout, seed, trained, _group_of(tuple(layout.site_of.values()), group, self.name))

    def _bounds(self, width: int) -> float:
        return width**-0.5

    @classmethod
    def for_budget(cls, shapes: Mapping[str, tuple[int, int]], budget: int, r: int) -> Budget:
        options = [{"trained": t, "group": g} for t in ("ABuv", "ABu", "AB") for g in ("type", "all")]

        def count(r: int, trained: str, group: str) -> int:
            layout = LoRALayout.from_shapes(shapes, r)
            groups = _group_of(layout.modules, group, cls.name)
            largest = {g: [0, 0] for g in groups}
            for (out, in_), g in zip((shapes[m] for m in layout.modules), groups, strict=True):
                largest[g] = [max(largest[g][0], out), max(largest[g][1], in_)]
            shared = r * sum(out * ("B" in trained) + in_ * ("A" in trained) for out, in_ in largest.values())
            scalers = sum(out for out, _ in shapes.values()) * ("v" in trained) + r * len(shapes) * ("u" in trained)
            return shared + scalers

        smallest = min(out + in_ for out, in_ in shapes.values())
        return nearest(budget, range(1, 2 + min(64, 1 + budget // smallest)), count, options)


def _group_of(modules: tuple[str, ...], group: str, who: str) -> list[int]:
    if group not in ("type", "all"):
        raise ProjectionError(f"{who}: group must be 'type' or 'all', got {group!r}.")
    keys = [m.rsplit(".", 1)[-1] if group == "type" else "" for m in modules]
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return [number[key] for key in keys]
