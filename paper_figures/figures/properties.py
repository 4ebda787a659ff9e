"""The properties of every projection, as its class claims them and as a small instance measures them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import uniproj
from analysis import cards
from experiments.names import method
from paper_figures.committed import Committed
from paper_figures.registry import register
from paper_figures.typesetting import Table

_PROOFS = "What each property means and when it holds: docs/design.md, section 'When P is isometric'."
WORDS = {
    "isometric": "isometric: $max|P^T P - I|$",
    "uniform": "uniform: $max n - min n$",
    "global_sharing": "global: ratio",
}


@register("properties")
def make(_: Committed) -> Sequence[Table]:
    """From the registry of projections alone."""
    rows = []
    for name in uniproj.names():
        card, verdicts = cards.describe(name), cards.verdicts(cards.instance(name))
        measured = {verdict["claim"]: verdict for verdict in verdicts.to_dict("records")}
        expected = "yes" if "isometric_in_expectation" in measured else "no"
        rows.append([method(name), name, f"${card['formula']}$", f"${card['d_formula']}$", card["kind"],
                     *(_verdict(measured[claim]) for claim in WORDS), expected, card["source"]])  # fmt: skip
    notes = [
        f"Measured on {cards.SPACE}; holds / does not hold is decided by `uniproj.claims`, the function the tests use.",
        "Global: modules that a coordinate reaches over those that as many rows drawn at random would reach; "
        "coordinates that stay within one module are local at any ratio. "
        f"{_PROOFS} The paper's own table of properties is not available to us.",
    ]
    heads = ["projection", "name", "$theta_D$", "$d$", "$P$", *WORDS.values(), "isometric in expectation (claimed)",
             "source"]  # fmt: skip
    return [Table("Properties of each projection", heads, rows, notes)]


def _verdict(verdict: Mapping[str, Any]) -> str:
    word = "yes" if verdict["holds"] else "no"
    return f"{word}: {verdict['value']:.3g}" + ("" if verdict["claimed"] or not verdict["holds"] else ", not claimed")
