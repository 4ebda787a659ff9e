"""Sizes against numbers computed by hand from the published configurations, and what growth is fitted from them."""

import numpy as np
import pytest
from scipy.stats import linregress

from analysis.overhead import growth, kernel, summary
from analysis.overhead.shapes import (
    LLAMA_2_7B,
    LLAMA_31_8B,
    LLAMA_32_3B,
    growing,
    roberta_large_query_value,
    sub_vectors,
)
from uniproj import LoRALayout

# per module r (out + in), summed over the modules of one layer, times the layers
BY_HAND = {
    ("MiniLM q,v", 1): 6 * 2 * 1 * (384 + 384),
    ("MiniLM q,v", 4): 6 * 2 * 4 * (384 + 384),
    ("RoBERTa-large q,v", 4): 24 * 2 * 4 * (1024 + 1024),
    ("RoBERTa-large q,v", 8): 24 * 2 * 8 * (1024 + 1024),
    ("Llama-2-7B", 4): 32 * 4 * (4 * (4096 + 4096) + 3 * (4096 + 11008)),
    ("Llama-2-7B", 16): 32 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008)),
    ("Llama-3.1-8B", 64): 32 * 64 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)),
}


def test_every_case_has_the_size_that_its_architecture_gives() -> None:
    assert list(BY_HAND.values()) == [9_216, 36_864, 393_216, 786_432, 9_994_240, 39_976_960, 167_772_160]
    for case in kernel.CASES:
        layout = LoRALayout.from_shapes(kernel.ARCHITECTURES[case.architecture](), case.r)
        assert BY_HAND[case.architecture, case.r] == layout.D
    assert len(kernel.CASES) == len(BY_HAND)
    assert len(roberta_large_query_value()) == 48 and len(LLAMA_2_7B.all_linear()) == len(LLAMA_31_8B.all_linear())


def test_the_layout_of_405B_and_the_3B_base() -> None:
    assert summary.predicted_D() == 126 * 16 * (2 * 32768 + 2 * (1024 + 16384) + 3 * (16384 + 53248)) == 623_443_968
    layout = LoRALayout.from_shapes(LLAMA_32_3B.all_linear(), 4)
    assert layout.D == 28 * 4 * (2 * 6144 + 2 * (1024 + 3072) + 3 * (3072 + 8192))


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_layouts_grow_with_the_square_of_the_layers(layers: int) -> None:
    assert 10_240 * layers**2 == growing(10_240 * layers**2).D


def test_sizes_span_four_decades() -> None:
    for sizes in (growth.SIZES_D, growth.SIZES_d, growth.SIZES_d_DENSE):
        assert sizes[-1] / sizes[0] == pytest.approx(1e4)


@pytest.mark.parametrize("architecture", kernel.ARCHITECTURES)
def test_vbloras_sub_vectors_divide_every_size_and_are_smaller_than_theta_D(architecture: str) -> None:
    layout = LoRALayout.from_shapes(kernel.ARCHITECTURES[architecture](), 4)
    sizes = sub_vectors(layout)
    assert all(n % sizes["vector_length"] == 0 for shape in layout.shapes().values() for n in shape)
    assert sizes["num_vectors"] * sizes["vector_length"] <= layout.D / 4


def test_the_fit_finds_a_known_exponent_and_its_error() -> None:
    sizes = np.logspace(2, 6, 9)
    exponent, error, factor = growth.power_law(sizes, 3.0 * sizes**1.5)
    assert exponent == pytest.approx(1.5) and error < 1e-9 and np.exp(factor) == pytest.approx(3.0)
    # a constant cost decides the small sizes, and the upper half does not see it
    noisy = 1e-5 + sizes * np.exp(np.random.default_rng(0).normal(0, 0.1, 9))
    law = linregress(np.log(sizes[4:]), np.log(noisy[4:]))
    assert growth.power_law(sizes, noisy) == pytest.approx((law.slope, law.stderr, law.intercept))
    assert growth.power_law(sizes[:4], 2 * sizes[:4])[0] == pytest.approx(1.0)


def test_the_extrapolation_to_405B() -> None:
    points = [
        {"method": "m", "axis": "D", "size": D, "D": D, "both_seconds": 2e-9 * D, "build_seconds": 0.0,
         "resident_bytes": 4 * D, "peak_bytes": 12 * D, "note": ""}
        for D in (10**4, 10**5, 10**6, 10**7)
    ]  # fmt: skip
    (row,) = summary.exponents(points)
    assert row["time_exponent"] == pytest.approx(1.0) and row["peak_exponent"] == pytest.approx(1.0)
    assert row["predicted_seconds"] == pytest.approx(2e-9 * 623_443_968)
    assert row["predicted_resident_bytes"] == 4 * 623_443_968
    (short,) = summary.exponents(points[:2])
    assert "too few sizes" in short["note"] and "time_exponent" not in short


def test_a_series_ends_where_the_next_size_would_take_too_long_or_too_much(monkeypatch) -> None:
    config = {"method": "unilora", "axis": "D", "sizes": [1e4, 4e4], "per_column": 19, "device": "cpu"}
    assert [row["D"] for row in growth.measure(config)] == [10_240, 40_960]
    monkeypatch.setattr(growth, "LIMIT", 1e-6)
    (row,) = growth.measure(config)
    assert row["note"].startswith("ends here: D = 4.0e+04 would take about")
    monkeypatch.undo()
    monkeypatch.setattr("analysis.overhead.problem.usable", lambda _: growth.PEAK_PER_COORDINATE * 20_000.0)
    (row,) = growth.measure(config)
    assert "ends here: D = 4.0e+04 needs about 0.0 GB" in row["note"]
