"""Globality, loads and the heat map against what is known of each method, and by counting on dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import uniproj
from analysis import cards
from analysis.columns import loads
from analysis.sharing import describe, heat_map, sharing
from analysis.sharing.measure import layer_of
from analysis.spaces import build, defaults, layout
from tests.analysis.small import SMALL, small
from uniproj import LoRALayout


def _facts(name: str, **variant: object) -> dict[str, float]:
    P = build(name, variant, layout("eight-64", 4), 240).P
    return describe(loads(P), P.layout)


def test_layers_are_named_by_their_last_number() -> None:
    assert layer_of("model.layers.10.self_attn.q_proj") == "model.layers.10"
    assert layer_of("head") == "head"


def test_known_methods() -> None:
    spread = _facts("unilora")
    assert (spread["n_min"], spread["n_max"], spread["row_max"]) == (17, 18, 1)
    # eight equal modules: E mu_j = 8 (1 - (7/8)^n_j)
    assert spread["modules_per_column"] == pytest.approx(8 * (1 - (7 / 8) ** (4096 / 240)), rel=0.03)
    assert spread["several_modules"] == spread["A_and_B"] == 1.0
    local = _facts("unilora_local", per="module")
    assert local["several_modules"] == 0.0 and local["A_and_B"] == 1.0
    assert _facts("unilora_local")["several_layers"] == 0.0
    apart = _facts("unilora_nonuniform")
    assert apart["A_and_B"] == 0.0 and apart["several_layers"] == 1.0
    assert (apart["n_min"], apart["n_max"]) == (12, 26)
    whole = _facts("lora")
    assert whole["entropy"] == pytest.approx(1.0) and whole["n_max_per_mean"] == 1.0 and whole["empty_rows"] == 0
    few = _facts("sparse")
    assert few["empty_rows"] == 4096 - 240
    # 64 r outputs with r rows each, 4 scalers of A with 64 rows each per module
    assert (_facts("vera")["n_min"], _facts("vera")["n_max"]) == (4, 64)


@pytest.mark.parametrize("name", uniproj.names())
def test_every_fraction_is_counted_on_the_dense_matrix(name: str) -> None:
    P = small(name)
    found = describe(loads(P), SMALL)
    hit = P.to_dense().detach() != 0
    modules = torch.stack([part.any(0) for part in hit.split([2 * (12 + 8)] * 6)])
    assert found["several_modules"] == pytest.approx(float((modules.sum(0) > 1).double().mean()))
    assert found["globality"] == pytest.approx(float(modules.double().mean(0).mean()))
    n = hit.sum(0).double()
    assert found["n_max_per_mean"] == pytest.approx(float(n.max() / n.mean()))
    share = n / n.sum()
    entropy = -(torch.xlogy(share, share)).sum() / torch.log(torch.tensor(float(P.d)))
    assert found["entropy"] == pytest.approx(float(entropy))


def test_the_picture_shares_out_every_column() -> None:
    P = build("unilora", {}, SMALL, 24).P
    shares = heat_map(loads(P), SMALL).groupby("coordinate")["share"].sum()
    assert len(shares) == 24 and np.allclose(shares, 1.0)


def test_a_method_that_cannot_be_built_is_a_note() -> None:
    rows, maps = sharing(defaults(["unilora_nonuniform"]), LoRALayout.flat(64), 8)
    assert "no modules" in rows["note"].iloc[0] and maps.empty


@pytest.mark.parametrize(("projection", "holds"), [("lora", False), ("sparse", False), ("unilora", True)])
def test_a_coordinate_within_one_module_is_not_called_global(projection: str, holds: bool) -> None:
    verdicts = cards.verdicts(cards.instance(projection)).set_index("claim")
    assert bool(verdicts.loc["global_sharing", "holds"]) is holds
