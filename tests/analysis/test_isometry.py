"""Verdicts against what is proved of each method, exactly and by probes, and a learned P on its way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import uniproj
from analysis.columns import gram, loads
from analysis.isometry import deviation, distortion, exact, measure, measured, probed, verdicts
from analysis.isometry.__main__ import main
from analysis.spaces import build, defaults, layout
from analysis.subject import Setting, Subject
from tests.analysis.small import SMALL, small

# Proved (lemmas on one non-zero per row, HDHD, Q of QR, orthonormal singular vectors; E P^T P for the random ones).
PROVED = {
    "isometric": (
        ("lora", {}), ("unilora", {}), ("unilora", {"assignment": "iid"}), ("unilora_local", {}),
        ("unilora_nonuniform", {}), ("unilora_sparse", {"exclusive": True}), ("sparse", {}),
        ("gaussian_orthonormal", {}), ("fastfood_sign", {}), ("lora_xs", {}),
    ),
    "in expectation": (("gaussian", {}), ("fastfood", {})),
    "not": (
        ("unilora_unnormalised", {}), ("unilora_sparse", {}), ("vera", {}), ("nola", {}),
        ("tied_lora", {"trained": "AB"}), ("lora_xs", {"side": "A"}), ("tinylora", {"u": 2}), ("vblora", {}),
    ),
}  # fmt: skip
CASES = [(verdict, name, variant) for verdict, each in PROVED.items() for name, variant in each]


@pytest.mark.parametrize(("verdict", "name", "variant"), CASES, ids=lambda c: str(c))
def test_verdicts_are_those_that_are_proved(verdict: str, name: str, variant: dict) -> None:
    # LoRA's d is D: 1,024 at rank 1
    row = verdicts([(name, variant)], "eight-64", 1 if name == "lora" else 4, 240).iloc[0]
    assert (row["verdict"], row["method"]) == (verdict, "exact")


def test_a_cut_block_leaves_sign_fastfood_isometric_in_expectation_only() -> None:
    row = verdicts([("fastfood_sign", {})], "eight-64", 3, 240).iloc[0]
    assert row["D"] == 3072
    # n' = 256 divides 3072, 2048 does not
    assert row["verdict"] == "isometric"
    assert verdicts([("fastfood_sign", {})], "eight-64", 3, 1025).iloc[0]["verdict"] == "in expectation"


@pytest.mark.slow
@pytest.mark.parametrize(("verdict", "name", "variant"), CASES, ids=lambda c: str(c))
def test_verdicts_are_exact_up_to_d_4096(verdict: str, name: str, variant: dict) -> None:
    # LoRA's d is D, 4,096 at rank 4; drawn freely, 4,096 of 16,384 columns would stay empty
    rank, d = 4 if name == "lora" else 16, 1024 if variant.get("assignment") == "iid" else 4096
    row = verdicts([(name, variant)], "eight-64", rank, d).iloc[0]
    assert (row["verdict"], row["method"]) == (verdict, "exact")


def test_known_numbers() -> None:
    # eight modules share A and B by type (4 each): P^T P = 4 I; 4096 rows on 240 columns: n_j is 17 or 18
    tied = exact(build("tied_lora", {"trained": "AB"}, layout("eight-64", 4), 0).P)
    assert (tied.sigma_min, tied.sigma_max) == pytest.approx((2.0, 2.0))
    loose = exact(build("unilora_unnormalised", {}, layout("eight-64", 4), 240).P)
    assert (loose.sigma_min, loose.sigma_max) == pytest.approx((17**0.5, 18**0.5))
    assert loose.max_error == pytest.approx(17.0)
    gaussian = exact(build("gaussian", {}, layout("eight-64", 4), 240).P)
    edge = (240 / 4096) ** 0.5
    assert gaussian.sigma_min == pytest.approx(1 - edge, abs=0.03)
    assert gaussian.sigma_max == pytest.approx(1 + edge, abs=0.03)


@pytest.mark.parametrize("name", uniproj.names())
def test_the_blocked_gram_is_the_dense_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.columns.AT_ONCE", 5 * SMALL.D)
    P = small(name)
    M = P.to_dense().detach()
    torch.testing.assert_close(gram(P), M.T @ M, rtol=1e-10, atol=1e-12)
    found = loads(P)
    assert np.array_equal(found.per_row, (M != 0).sum(1).numpy())
    assert np.array_equal(found.per_column, (M != 0).sum(0).numpy())
    np.testing.assert_allclose(found.row_energy, (M**2).sum(1).numpy(), atol=1e-12)
    by_block = torch.stack([part.sum(0) for part in (M**2).split([b.numel for b in SMALL.blocks])])
    np.testing.assert_allclose(found.energy.toarray(), by_block.numpy(), atol=1e-12)


@pytest.mark.parametrize("name", uniproj.names())
def test_probes_agree_with_the_exact_numbers(name: str) -> None:
    P = build(name, {"u": 16} if name == "tinylora" else uniproj.get(name).variants[0], SMALL, 64).P
    found, whole = probed(P, probes=64), exact(P)
    assert found.is_isometric == whole.is_isometric
    assert abs(found.rms - whole.rms) <= 6 * found.rms_error + 1e-9
    assert abs(found.gain - whole.gain) <= 6 * found.gain_error + 1e-9
    # what Lanczos has seen lies inside the spectrum, and at its ends where it converged
    assert whole.sigma_min - 1e-7 <= found.sigma_min <= found.sigma_max <= whole.sigma_max + 1e-7
    if found.converged:
        assert found.sigma_max == pytest.approx(whole.sigma_max, rel=0.02)


def test_large_d_takes_the_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MOST_EXACT", 16)
    assert deviation(build("unilora", {}, SMALL, 32).P).method == "probes"


@pytest.mark.slow
def test_ten_million_rows_fit_two_minutes_of_two_cores_and_two_gigabytes() -> None:
    for name, verdict in (("unilora", "isometric"), ("unilora_unnormalised", "not")):
        row = verdicts([(name, {})], "ten-million", 4, 500_000).iloc[0]
        assert row["verdict"] == verdict and row["D"] > 9.8e6
        assert row["peak_bytes"] < 2e9


def test_distances_are_ratios_of_norms() -> None:
    P = build("gaussian", {}, SMALL, 24).P
    x, y = torch.randn(2, 5, 24, dtype=torch.float64)
    x[0] = y[0]
    M = P.to_dense()
    wanted = ((x - y)[1:] @ M.T).norm(dim=1) / (x - y)[1:].norm(dim=1)
    torch.testing.assert_close(distortion(P, x, y), wanted)


def test_real_pairs_and_a_learned_P_along_a_training() -> None:
    subject = Subject(Setting(max_length=8, batch_size=4))
    pairs, path = measured(subject, defaults(["unilora", "vblora"]), 64, steps=6, lr=1e-2)
    whole = pairs[pairs["projection"] == "unilora"]
    assert set(whole["pairs"]) == {"random", "adapters", "gradients"}
    # an isometry keeps the length of what training does, too
    assert np.allclose(whole[["least", "largest"]], 1.0)
    assert (pairs.loc[pairs["pairs"] == "adapters", "n"] >= 6).all()
    moved = path[path["projection"] == "vblora"]
    assert moved["learned"].all() and moved["step"].is_monotonic_increasing
    assert moved["rms"].nunique() > 1
    assert path[path["projection"] == "unilora"]["rms"].nunique() == 1


def test_the_command_shows_a_plugin_without_being_told_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = Path(__file__).parents[2] / "examples" / "cyclic.py"
    asked = ["--plugins", str(example), "--steps", "0", "--d", "64", "--json", "--out", str(tmp_path)]
    assert main(["--projections", "cyclic", "lora_xs", *asked]) == 0
    rows = json.loads(capsys.readouterr().out)["verdicts"]
    assert {row["projection"]: row["verdict"] for row in rows if row["variant"] == row["projection"]} == {
        "cyclic": "isometric",
        "lora_xs": "isometric",
    }
    assert main(["--projections", "cyclc", *asked]) == 2
    assert "Did you mean" in capsys.readouterr().err
