"""The layout of theta_D: order, views, fingerprint."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.spaces import layouts
from uniproj import Block, LoRALayout, ProjectionError, build
from uniproj.layout import Site

SHAPES = {"h.10.q": (3, 2), "h.2.v": (4, 5), "h.2.q": (1, 6)}


def test_order_is_natural_in_the_names_and_B_before_A() -> None:
    layout = LoRALayout.from_shapes(SHAPES, 2)
    assert layout.modules == ("h.2.q", "h.2.v", "h.10.q")
    assert [(b.factor, b.shape, b.offset) for b in layout.blocks[:3]] == [
        ("B", (1, 2), 0), ("A", (2, 6), 2), ("B", (4, 2), 14),
    ]  # fmt: skip
    assert layout.D == 2 * (1 + 6 + 4 + 5 + 3 + 2)
    assert layout == LoRALayout.from_shapes(dict(reversed(SHAPES.items())), 2)


def test_fingerprint_is_the_documented_hash() -> None:
    import hashlib

    text = '[["a","B",3,1],["a","A",1,2]]'
    assert LoRALayout.from_shapes({"a": (3, 2)}, 1).fingerprint == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("change", [{"h.2.q": (1, 7)}, {"h.3.q": (1, 6)}])
def test_fingerprint_sees_shapes_and_names(change) -> None:
    assert LoRALayout.from_shapes({**SHAPES, **change}, 2).fingerprint != LoRALayout.from_shapes(SHAPES, 2).fingerprint


@given(layout=layouts(), batch=st.integers(0, 2))
def test_flatten_inverts_split(layout: LoRALayout, batch: int) -> None:
    theta_D = torch.arange(float((batch + 1) * layout.D)).view(batch + 1, layout.D).squeeze(0)
    parts = layout.split(theta_D)
    factors = {(b.module, b.factor): part for b, part in zip(layout.blocks, parts, strict=True)}
    assert torch.equal(layout.flatten(factors), theta_D)
    assert all(tuple(p.shape[-2:]) == b.shape for p, b in zip(parts, layout.blocks, strict=True))


@given(layout=layouts())
def test_rows_and_restriction_agree(layout: LoRALayout) -> None:
    some = layout.modules[::2]
    rows = layout.rows(some)
    assert len(rows) == layout.restrict(some).D
    owners = layout.module_index()[rows]
    assert {layout.modules[i] for i in owners.tolist()} == set(some)


def test_split_is_one_autograd_node() -> None:
    layout = LoRALayout.from_shapes(SHAPES, 2)
    theta_D = torch.randn(layout.D, requires_grad=True)
    nodes = {part.grad_fn.next_functions[0][0] for part in layout.split(theta_D)}
    assert len(nodes) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRALayout([]), "at least one block"),
        (lambda: LoRALayout.flat(0), "D must be at least 1"),
        (lambda: LoRALayout([Block("a", "B", (2, 1), 0), Block("a", "A", (1, 2), 1)]), "without gap or overlap"),
        (lambda: LoRALayout.from_shapes({"a": (0, 2)}, 1), "a must have sizes and rank of at least 1"),
        (lambda: LoRALayout.flat(3).pairs(), "flat layout has no modules"),
        (lambda: LoRALayout.from_shapes(SHAPES, 1).rows(["x"]), "unknown modules"),
        (
            lambda: LoRALayout.from_shapes({"a": (1, 2)}, 1).flatten(
                {("a", "B"): torch.zeros(2, 1), ("a", "A"): torch.zeros(1, 2)}
            ),
            r"a.B must have shape \(1, 1\), got \(2, 1\)",
        ),
    ],
)
def test_errors(make, message: str) -> None:
    with pytest.raises(ProjectionError, match=message):
        make()


@pytest.mark.parametrize("sizes", [(3,), (3, 2, 2, 2)])
def test_sizes_of_another_length_are_not_taken_for_numbers_in_a_name(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="values to unpack"):
        LoRALayout.from_shapes({"a": sizes}, 1)


def test_a_layout_survives_its_json() -> None:
    layout = LoRALayout.from_shapes(
        {"h.10.v": (3, 5), "h.2.q": (7, 4), "h.2.a": (2, 2)}, {"h.10.v": 1, "h.2.q": 2, "h.2.a": 3}
    )
    assert layout.to_json() == '[["h.2.a",2,2,3],["h.2.q",7,4,2],["h.10.v",3,5,1]]'
    assert LoRALayout.from_json(layout.to_json()) == layout


def test_layouts_with_other_counts_or_axes_are_not_equal() -> None:
    """They have the same blocks, so the same P and the same fingerprint."""
    alike = [
        [Site("a.0", 4, 6, 2), Site("a.1", 4, 6, 2)],
        [Site("a", 4, 6, 2, 2)],
        [Site("a", 4, 6, 2, 2, (3, 2))],
        [Site("a", 4, 6, 2, 2, (2, 3))],
        [Site("a", 4, 6, 2, 2, ())],
    ]
    layouts = [LoRALayout.of_sites(sites) for sites in alike for _ in range(2)]
    assert len({layout.fingerprint for layout in layouts}) == 1 and len(set(layouts)) == len(alike)
    for i, one in enumerate(layouts):
        assert [one == other for other in layouts] == [i // 2 == j // 2 for j in range(len(layouts))]


def test_stacks_and_axes_survive_json_names_and_restriction() -> None:
    sites = [
        Site("h.experts", 6, 4, 2, 3),
        Site("h.experts.5", 2, 2, 1),  # beside the stack, whose modules are h.experts.0 to h.experts.2
        Site("h.grouped", 3, 8, 1, 2, (2, 4)),
        Site("h.tokens", 4, 9, 2, axes=()),
    ]
    layout = LoRALayout.of_sites(reversed(sites))
    assert layout.sites == tuple(sites) and [site.rank for site in sites] == [2, 1, 2, 2]
    assert layout.D == 3 * 2 * (6 + 4) + (2 + 2) + 2 * (3 + 8) + 2 * (4 + 9)
    again = LoRALayout.from_json(layout.to_json())
    assert again == layout and again.sites == layout.sites
    one_by_one = LoRALayout.from_shapes(layout.shapes(), {b.module: b.shape[1] for b, _ in layout.pairs()})
    assert one_by_one.fingerprint == layout.fingerprint and len(one_by_one.sites) == 7
    assert one_by_one != layout and len({one_by_one, layout, again}) == 2
    now = {site.name: f"x.{site.name}" for site in sites}
    assert [site.name for site in layout.renamed(now).sites] == list(now.values())
    kept = layout.restrict(["h.experts.0", "h.experts.2", "h.grouped.0", "h.grouped.1"]).sites
    assert [(s.name, s.count, s.axes) for s in kept] == [
        ("h.experts.0", None, None),
        ("h.experts.2", None, None),
        ("h.grouped", 2, (2, 4)),
    ]
    theta_D = torch.arange(layout.D)
    for (B, A), site in zip(zip(*[iter(layout.split_sites(theta_D))] * 2, strict=True), layout.sites, strict=True):
        for i, module in enumerate(site.modules):
            pair = (B[i], A[i]) if site.count else (B, A)
            for block, factor in zip((layout.block(module, "B"), layout.block(module, "A")), pair, strict=True):
                assert torch.equal(factor.flatten(), theta_D[block.rows])


def test_a_stack_is_of_one_layer_and_of_one_type() -> None:
    shapes = {f"h.{i}.{name}": sizes for i in range(2) for name, sizes in (("q", (2, 2)), ("up", (3, 2, 2)))}
    layout = LoRALayout.from_shapes(shapes, r=1)
    assert layout.modules[:3] == ("h.0.q", "h.0.up.0", "h.0.up.1")

    def used(per: str) -> list[set[int]]:
        """The columns of theta_d that each module takes."""
        dense = build("unilora_local", layout=layout, d=6, per=per).to_dense()
        return [set(dense[layout.rows([module])].nonzero()[:, 1].tolist()) for module in layout.modules]

    assert [len(own) for own in used("module")] == [1] * 6
    layers = used("layer")
    assert [len(set().union(*layers[i : i + 3])) for i in (0, 3)] == [3, 3]
    assert sum(map(len, layers)) > 6 and set().union(*layers[:3]).isdisjoint(set().union(*layers[3:]))
    # one B (out, 1) and one A (1, in) for q, and one for up
    assert build("tied_lora", layout=layout, trained="AB").d == (2 + 2) + (3 + 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[["h.10.v",3,5,1],["h.2.q",7,4,2]]', r"expected h\.2\.q, got h\.10\.v"),
        ('[["a",2,2,1],["a",2,2,1]]', "must stand once each, .* got a twice"),
        ('[["a",2,2,true]]', "must be rows"),
        ('[["a",2,2]]', "must be rows"),
        ('[["a",2,2,0]]', "sizes and rank of at least 1"),
        ('[["a",2,2.5,1]]', "must be rows"),
        ('[["a",2,2,1,0]]', "sizes and rank of at least 1, got out=2, in=2, r=1, count=0"),
        ('[["a",2,2,1,-3]]', "count=-3"),
        ('[["a",2,2,1,true]]', "must be rows"),
        ('[["a",2,2,1,null]]', "must be rows"),
        ('[["a",2,2,1,[2],2]]', "must be rows"),
        ('[["a",2,2,1,["b"]]]', "must be rows"),
        ('[["a",2,2,1,[1,1,1,1,2]]]', "must be rows"),
        ('[["a",2,6,1,[2,2]]]', r"must have axes whose product is in=6, got \(2, 2\)"),
        ('[["a",2,6,1,[-2,-3]]]', "must have axes whose product is in=6"),
        ('[["a",2,2,1,2],["a.1",2,2,1]]', r"got a\.1 twice"),
        ('[["a",2,2,1,2],["a.0.q",2,2,1]]', r"expected a\.0\.q, got a\.1"),
        ('[["a", 2, 2, 1, 1000000000000]]', "must be as to_json writes it"),
        ("[", "must be rows"),
        ("[" * 100_000, "must be rows"),
        ("[]", "at least one block"),
        ("3", "must be rows"),
    ],
)
def test_what_is_no_layout_is_refused(text: str, message: str) -> None:
    with pytest.raises(ProjectionError, match=message):
        LoRALayout.from_json(text)


@given(names=st.lists(st.text("019٣ab.\x01", min_size=1), min_size=2, unique=True))
def test_the_order_is_that_of_the_parts_of_a_name(names: list[str]) -> None:
    """A number before text, numbers by their value: as fingerprints have it since format 1."""

    def key(name: str) -> object:
        parts = re.findall(r"\d+|\D+", name)
        return tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts), name

    assert LoRALayout.from_shapes(dict.fromkeys(names, (1, 1)), 1).modules == tuple(sorted(names, key=key))


def test_a_number_of_five_thousand_digits_is_refused() -> None:
    with pytest.raises(ProjectionError, match="at most 4,300 digits"):
        LoRALayout.from_shapes({"h." + "1" * 5000: (1, 1)}, 1)
