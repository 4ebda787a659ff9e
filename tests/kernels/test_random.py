"""The generator against the published vectors of Philox, random access, and simple statistics."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from uniproj.kernels.random import bits, bits_of, draw, key_of, normal, philox, signs, stream_id, uniform

# Random123 1.09, kat_vectors, philox4x32 with 10 rounds: (counter, key, output)
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_vectors(counter, key, expected) -> None:
    out = philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in out) == expected


def test_the_stream_is_its_specification_in_plain_integers() -> None:
    """Word i of (seed, stream, part), computed with Python integers from the docstring."""
    import zlib

    def word(i: int, seed: int, stream: str, part: int) -> int:
        c = [(i // 4) & 0xFFFFFFFF, (i // 4) >> 32, zlib.crc32(stream.encode()), part]
        k = [seed & 0xFFFFFFFF, seed >> 32]
        for _ in range(10):
            p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return c[i % 4]

    seed, start = 0x123456789ABC, 2**34 + 1  # both words of the key, both words of the counter
    assert bits(seed, "golden", 9, part=3, start=start).tolist() == [
        word(start + i, seed, "golden", 3) for i in range(9)
    ]


GOLDEN = [3810038908, 70324950, 2602873199, 4281138421, 1697511045]
GOLDEN_NORMAL = [0.4869106113910675, 1.0006228685379028, 1.2230898141860962, 2.1659274101257324]
NEAR_END = 2**34 - 2  # the counter's second word starts at word 2^34
GOLDEN_NEAR_END = [2971944045, 4032532495, 3966618345, 2680933281]


def test_golden_vector() -> None:
    assert bits(7, "golden", 5).tolist() == GOLDEN
    assert bits(2**64 - 1, "golden", 4, part=2**32 - 1, start=NEAR_END).tolist() == GOLDEN_NEAR_END
    assert normal(7, "golden", 4).tolist() == GOLDEN_NORMAL


def test_golden_vector_on_a_device(device: str) -> None:
    assert bits(7, "golden", 5, device=device).tolist() == GOLDEN
    found = bits(2**64 - 1, "golden", 4, part=2**32 - 1, start=NEAR_END, device=device)
    assert found.dtype == torch.int64 and found.tolist() == GOLDEN_NEAR_END


@pytest.mark.parametrize("start", [0, 1, 2, 3, 1021, 2**34 - 5, 2**40 + 7])
@pytest.mark.parametrize(("seed", "stream", "part"), [(0, "a", 0), (1, "a", 1), (2**63 + 12345, "b.c", 2**31 + 9)])
def test_triton_gives_the_words_at_any_coordinate(
    seed: int, stream: str, part: int, start: int, triton_device: str
) -> None:
    for count in (0, 1, 6, 1025):
        found = bits(seed, stream, count, part=part, start=start, device=triton_device)
        assert torch.equal(found.cpu(), bits(seed, stream, count, part=part, start=start))


def test_the_operator_keeps_the_rules_of_torch_library(device: str) -> None:
    inputs = ([*key_of(3, "s"), 0], 5, 9, torch.device(device))
    torch.library.opcheck(draw, inputs)
    compiled = torch.compile(lambda: draw(*inputs), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled().cpu(), bits(3, "s", 9, start=5))


def test_numbers_over_several_chunks_and_threads_are_the_same_stream(set_threads: Callable[[int], None]) -> None:
    count = 2**17 * 3 + 5
    set_threads(3)
    words, numbers = bits(5, "s", count, start=3), normal(5, "s", count // 2, start=3)
    set_threads(1)
    for start in (0, 2**17 - 5, 2**17, 2**18 + 1):
        assert torch.equal(words[start : start + 11], bits(5, "s", 11, start=start + 3))
        assert torch.equal(numbers[start // 2 :][:11], normal(5, "s", 11, start=start // 2 + 3))
    assert len(words) == count and bits(5, "s", 0).tolist() == normal(5, "s", 0).tolist() == []


def test_a_stream_has_a_name_and_a_number() -> None:
    assert torch.equal(bits(3, "name", 9), bits(3, stream_id("name"), 9, device="cpu"))


@given(start=st.integers(0, 50), count=st.integers(1, 50))
def test_any_chunk_is_a_slice_of_the_stream(start: int, count: int) -> None:
    assert torch.equal(bits(1, "s", count, start=start), bits(1, "s", 100)[start : start + count])
    assert torch.equal(normal(1, "s", count, start=start), normal(1, "s", 100)[start : start + count])
    assert torch.equal(uniform(1, "s", count, start=start), uniform(1, "s", 100)[start : start + count])


def test_streams_seeds_and_parts_are_unrelated() -> None:
    streams = torch.stack([
        uniform(0, "a", 20_000), uniform(1, "a", 20_000), uniform(2**32, "a", 20_000),
        uniform(0, "b", 20_000), uniform(0, "a", 20_000, part=1),
    ])  # fmt: skip
    correlation = torch.corrcoef(streams) - torch.eye(5)
    assert correlation.abs().max() < 5 / 20_000**0.5


def test_distributions() -> None:
    n = 100_000
    assert scipy.stats.kstest(normal(3, "n", n).numpy(), "norm").pvalue > 1e-3
    assert scipy.stats.kstest(uniform(3, "u", n).numpy(), "uniform", args=(-1, 2)).pvalue > 1e-3
    assert abs(int(signs(3, "s", n).sum())) < 5 * n**0.5
    counts = np.bincount(bits(3, "b", n).numpy() >> 24, minlength=256)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_words_of_many_streams_are_those_of_each() -> None:
    streams, parts, counts = ["a", "b", "a", "c"], [0, 3, 2, 0], [1, 9, 4, 0]
    wanted = [bits(2**40 + 5, *named, part=part) for *named, part in zip(streams, counts, parts, strict=True)]
    assert torch.equal(bits_of(2**40 + 5, streams, parts, counts), torch.cat(wanted))
