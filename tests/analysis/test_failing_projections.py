"""A projection that raises has a row that says so in every analysis, and the others keep theirs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from analysis import cards
from analysis.isometry import measured
from analysis.isometry.__main__ import main as isometry_main
from analysis.landscape import landscape
from analysis.landscape import measure as landscape_measure
from analysis.reconstruction import measure, reconstruct
from analysis.sharing.__main__ import main as sharing_main
from analysis.spaces import defaults
from analysis.spectrum.__main__ import main as spectrum_main
from analysis.subject import Setting, Subject
from analysis.training import train_lora
from uniproj import plugins

PLUGIN = """
from uniproj import register
from uniproj.registry import get


class Failing(get("unilora")):
    variants = ({},)


@register("fails_when_built")
class FailsWhenBuilt(Failing):
    def __init__(self, layout, d, seed=0):
        raise ValueError("no luck")


@register("fails_when_used")
class FailsWhenUsed(Failing):
    def _matvec(self, theta_d):
        raise ValueError("no luck")

    def entries(self):
        raise ValueError("no luck")


@register("fails_in_backward")
class FailsInBackward(Failing):
    def _rmatvec(self, theta_D):
        raise ValueError("no luck")
"""
BUILDING, FORWARD, _ = FAILING = ["fails_when_built", "fails_when_used", "fails_in_backward"]
NAMES = ["unilora_local", *FAILING, "unilora"]


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "failing.py").write_text(PLUGIN)
    return str(tmp_path / "failing.py")


def _failed(rows: pd.DataFrame) -> set[str]:
    assert list(dict.fromkeys(rows["projection"])) == NAMES
    failed = rows[rows["note"].str.startswith("failed")]
    assert set(failed["note"]) == {"failed: ValueError: no luck"}
    return set(failed["projection"])


# of a sparse P these ask no product with its transpose
@pytest.mark.parametrize(
    ("main", "name", "key"),
    [
        (isometry_main, "isometry", "verdicts"),
        (sharing_main, "sharing", "columns"),
        (spectrum_main, "spectrum", "spectrum"),
    ],
)
def test_commands_go_on_and_write_their_files(
    main: Callable, name: str, key: str, plugin: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--layout", "eight-64", "--d", "64", "--plugins", plugin, "--out", str(tmp_path / "out")]
    asked += ["--steps", "0"] if main is isometry_main else []
    assert main(["--projections", *NAMES, "--json", *asked]) == 0
    found = pd.DataFrame(json.loads(capsys.readouterr().out)[key])
    assert _failed(found) == {BUILDING, FORWARD}
    rest = found[~found["note"].str.startswith("failed")]
    assert {"unilora_local", "unilora"} <= set(rest["projection"])
    written = pd.read_csv(tmp_path / "out" / f"{name}-{key}.csv")
    assert list(written.columns) == list(found.columns) and list(written["variant"]) == list(found["variant"])
    assert {f"{name}.{kind}" for kind in ("png", "pdf", "json")} <= {path.name for path in (tmp_path / "out").iterdir()}
    # as a table, and where nothing is left to draw
    assert main(["--projections", BUILDING, *asked]) == 0
    printed = capsys.readouterr().out
    assert "failed: ValueError: no luck" in printed and f"Tables, JSON and picture: {tmp_path / 'out'}" in printed


def test_analyses_of_a_training_go_on(plugin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins.load([plugin])
    monkeypatch.setattr(measure, "FISHER_ROWS", 1)
    monkeypatch.setattr(landscape_measure, "POINTS", 3)
    subject, chosen = Subject(Setting(max_length=8, batch_size=2, test_size=4)), defaults(NAMES)
    pairs, path = measured(subject, chosen, 64, steps=2, lr=1e-3)
    assert _failed(pairs) == set(FAILING) and set(path["projection"]) == {"unilora_local", "unilora"}
    norms, losses = landscape(subject, chosen, 64, steps=1, lr=1e-3)
    assert _failed(norms) == set(FAILING) and set(losses["projection"]) == {"unilora_local", "unilora"}
    energy = reconstruct(subject, *train_lora(subject, 1, 1e-2), chosen, [64])
    assert _failed(energy) == set(FAILING) and energy["factor"].notna().sum() == 2


def test_the_card_of_the_report_says_so(plugin: str) -> None:
    plugins.load([plugin])
    found = {name: cards.card(name) for name in NAMES}
    assert {name for name, card in found.items() if card.get("failed") == "ValueError: no luck"} == {BUILDING, FORWARD}
    assert all(card["formula"] for card in found.values())
