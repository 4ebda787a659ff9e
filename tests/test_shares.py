"""How Uni-LoRA's local ablation shares d out among the layers."""

from hypothesis import given
from hypothesis import strategies as st

from uniproj.projections.unilora_local import _shares


def _one_by_one(d: int, sizes: list[int]) -> list[int]:
    """The definition: the share furthest from its proportion, the first of equals, moves by one until all is given."""
    shares = [max(1, d * size // sum(sizes)) for size in sizes]
    while sum(shares) != d:
        step = 1 if sum(shares) < d else -1
        movable = [i for i, n in enumerate(shares) if 1 <= n + step <= sizes[i]]
        shares[max(movable, key=lambda i: (step * (d * sizes[i] / sum(sizes) - shares[i]), -i))] += step
    return shares


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30), data=st.data())
def test_shares_are_those_of_the_definition(sizes: list[int], data: st.DataObject) -> None:
    d = data.draw(st.integers(len(sizes), sum(sizes)))
    assert _shares(d, sizes) == _one_by_one(d, sizes)
