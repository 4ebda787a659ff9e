"""Singular values, stable ranks and coherence against dense decompositions."""

from __future__ import annotations

import pytest
import torch

import uniproj
from analysis.spaces import build, layout
from analysis.spectrum import of_projection, of_updates, spectrum
from analysis.spectrum.measure import factor_pairs, stable_rank
from tests.analysis.small import SMALL, small


def test_stable_rank_of_known_values() -> None:
    assert stable_rank(torch.tensor([3.0, 3.0, 3.0])) == pytest.approx(3.0)
    assert stable_rank(torch.tensor([2.0, 1.0, 0.0])) == pytest.approx(1.25)
    assert stable_rank(torch.zeros(2)) == 0.0


@pytest.mark.parametrize("name", uniproj.names())
def test_values_and_coherence_are_the_dense_ones(name: str) -> None:
    P = small(name)
    values, facts = of_projection(P)
    M = P.to_dense().detach()
    dense = torch.linalg.svdvals(M)
    torch.testing.assert_close(values, dense, rtol=1e-6, atol=1e-6 * float(dense[0]))
    unit = M / M.norm(dim=0)
    cosines = unit.T @ unit - torch.eye(P.d)
    assert facts["column_coherence"] == pytest.approx(float(cosines.abs().max()), abs=1e-9)
    rows = M.norm(dim=1) ** 2
    assert facts["row_coherence"] == pytest.approx(float(len(rows) * rows.max() / rows.sum()))
    assert facts["rank"] == int(torch.linalg.matrix_rank(M, rtol=1e-7))


def test_columns_that_share_no_row_need_no_gram_matrix_and_others_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.spectrum.measure.MOST_EXACT", 16)
    monkeypatch.setattr("analysis.spectrum.measure.gram", None)
    table, curves = spectrum([("lora", {}), ("unilora_unnormalised", {}), ("gaussian", {})], SMALL, 24)
    whole, loose, dense = table.to_dict("records")
    assert whole["d"] == SMALL.D and (whole["sigma_min"], whole["sigma_max"]) == (1.0, 1.0)
    # 240 rows on 24 columns
    assert loose["sigma_max"] == pytest.approx(10**0.5) and loose["column_coherence"] == 0.0
    assert dense["note"].endswith("got 24. Lower --d.") and set(curves["projection"]) == {
        "lora",
        "unilora_unnormalised",
    }


def test_a_redundant_method_says_so() -> None:
    # 64 numbers drive a 4 x 4 matrix per module: rank 16 of 64 in each of 8 modules
    P = build("tinylora", {"u": 64}, layout("eight-64", 4), 0).P
    _, facts = of_projection(P)
    assert facts["rank"] == 8 * 16 and facts["kappa"] == float("inf")


def test_delta_W_has_the_stable_rank_of_the_product() -> None:
    P = build("unilora", {}, SMALL, 24).P
    theta_d = torch.linspace(-1, 1, 24, dtype=torch.float64)
    for B, A in factor_pairs(P, theta_d):
        small = torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T)
        torch.testing.assert_close(small, torch.linalg.svdvals(B @ A)[:2])
    facts = of_updates(P)
    assert 1.0 <= facts["delta_W_stable_rank"] <= 2.0 and 1.0 <= facts["A_stable_rank"] <= 2.0
