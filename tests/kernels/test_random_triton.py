"""The generator inside Triton, word for word; in the interpreter with TRITON_INTERPRET=1, or on a GPU."""

import pytest
import torch

from tests.kernels.test_random import GOLDEN, GOLDEN_NEAR_END, NEAR_END
from uniproj.kernels import backend
from uniproj.kernels.random import bits, draw, key_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    backend() != "triton-interpreter" and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU"
)


def test_golden_vectors() -> None:
    assert bits(7, "golden", 5, device=DEVICE).tolist() == GOLDEN
    found = bits(2**64 - 1, "golden", 4, part=2**32 - 1, start=NEAR_END, device=DEVICE)
    assert found.dtype == torch.int64 and found.tolist() == GOLDEN_NEAR_END


@pytest.mark.parametrize("start", [0, 1, 2, 3, 1021, 2**34 - 5, 2**40 + 7])
@pytest.mark.parametrize(("seed", "stream", "part"), [(0, "a", 0), (1, "a", 1), (2**63 + 12345, "b.c", 2**31 + 9)])
def test_words_are_the_cpus_at_any_coordinate(seed: int, stream: str, part: int, start: int) -> None:
    for count in (0, 1, 6, 1025):
        found = bits(seed, stream, count, part=part, start=start, device=DEVICE)
        assert torch.equal(found.cpu(), bits(seed, stream, count, part=part, start=start))


def test_the_operator_keeps_the_rules_of_torch_library() -> None:
    inputs = ([*key_of(3, "s"), 0], 5, 9, torch.device(DEVICE))
    torch.library.opcheck(draw, inputs)
    compiled = torch.compile(lambda: draw(*inputs), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled().cpu(), bits(3, "s", 9, start=5))
