"""The permutation in Triton's kernels at sizes whose theta_D would not fit into memory."""

import pytest
import torch

from uniproj.kernels.deal import Deal, Group
from uniproj.kernels.permutation import MOST, permute

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from uniproj.kernels import partition_triton  # noqa: E402

_permute = partition_triton._permute


@triton.jit
def _points(x, y, group, tables, INVERSE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, _permute(tl.load(x + i).to(tl.uint32), group, tables, INVERSE).to(tl.int64))


@pytest.mark.parametrize("n", [1, 2, 3, 1000, 2**30, MOST])
def test_points_and_their_images(n: int, triton_device: str) -> None:
    """Tables of large n have numbers beyond 2^15; the last points of a grid leave [0, n) and walk on."""
    deal = Deal.of([Group([slice(0, n)], min(n, 7), "large")], 5)
    x = torch.cat([torch.arange(32).clamp(max=n - 1), (n - 1 - torch.arange(32)).clamp(min=0)])
    images = permute(x, n, 5, "large")
    group, tables, x, expected = (t.to(triton_device) for t in (deal.groups, deal.tables, x, images))
    for given, wanted, inverse in ((x, expected, False), (expected, x, True)):
        found = torch.empty_like(given)
        _points[(1,)](given, found, group, tables, INVERSE=inverse, BLOCK=64, num_warps=1)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("n", [2**30, MOST])
def test_columns_of_a_few_rows_of_many(n: int) -> None:
    rows = torch.arange(0, n, n // 500)
    deal = Deal.of([Group([slice(0, n)], 1000, "large")], 5)
    assert torch.equal(deal.columns(rows).long(), permute(rows, n, 5, "large") % 1000)


def test_vectors_of_several_launches(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deal = Deal.of([Group([slice(0, 300)], 40, "a")], 5)
    source = [getattr(deal, name).to(triton_device) for name in ("by_row", "by_position", "groups", "tables")]
    x, y = (torch.arange(5.0 * n).view(5, n).to(triton_device) for n in (40, 300))
    at_once = [
        partition_triton.deal_out(x, *source, [300, 40], torch.float32),
        partition_triton.gather_in(y, *source, [300, 40], torch.float32),
    ]
    index = deal.index().long()
    monkeypatch.setattr(partition_triton, "_VECTORS", 2)
    assert torch.equal(at_once[0].cpu(), x.cpu()[:, index])
    assert torch.equal(partition_triton.deal_out(x, *source, [300, 40], torch.float32), at_once[0])
    assert torch.equal(partition_triton.gather_in(y, *source, [300, 40], torch.float32), at_once[1])
