"""diffusers runs for real: what its pipelines make with exported adapters is what they make with the originals.

`python -m pytest tests/engines/test_diffusers.py -m slow --engines results/engines` writes what it measured.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.files import write_json
from experiments.provenance import provenance
from tests.engines.engine import ENGINES, ROOT
from tests.exchange.tools import difference

# relative to the largest number: float32's unit, 6e-8, through a few layers
TOLERANCE = 2e-6

pytestmark = pytest.mark.slow


def test_the_lines_of_the_page_load_what_was_exported(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    engine = ENGINES["diffusers"]
    answer = engine.ask({"repository": str(ROOT), "lines": engine.lines()}, tmp_path)
    models = {part: _measured(found) for part, found in answer["models"].items()}
    if folder := pytestconfig.getoption("--engines", None):
        said = asdict(engine) | {key: answer[key] for key in ("versions", "seconds")}
        write_json(Path(folder) / "diffusers.json", {**said, "models": models, "provenance": provenance("cpu")})
    assert models.keys() == {"unet", "transformer"}
    for part, of_users in models.items():
        assert of_users.keys() == {"ada", "bob", "both"}
        for users, measured in of_users.items():
            assert measured["effect"] > 1e3 * TOLERANCE and measured["difference"] <= TOLERANCE, (part, users, measured)


def _measured(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By the users whose adapters are active: what diffusers is off, and what the adapters do."""
    (plain,) = map(torch.tensor, found["plain"].values())
    pairs = {users: (torch.tensor(found["theirs"][users]), torch.tensor(ours)) for users, ours in found["ours"].items()}
    return {
        users: {"difference": difference(theirs, ours), "effect": difference(plain, ours)}
        for users, (theirs, ours) in pairs.items()
    }
