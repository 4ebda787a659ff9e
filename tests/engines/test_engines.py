"""Each engine runs for real: what it makes of an exported adapter is what PyTorch makes of the original.

`python -m pytest tests/engines -m slow --engines results/engines` writes what it measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from experiments.files import write_json
from experiments.provenance import provenance
from tests.engines.engine import TALKING, Engine
from tests.engines.subject import NEW_TOKENS, USERS, Continuation, Subject
from uniproj.exchange import export, registry

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
each_engine = pytest.mark.parametrize("engine", TALKING.values(), ids=list(TALKING))


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject.make(tmp_path_factory.mktemp("subject"))


def _exported(engine: Engine, subject: Subject, folder: Path) -> dict[str, str]:
    """What the engine reads, by user."""
    written = {user: folder / f"{user}{registry.get(engine.format).suffix}" for user in USERS}
    for user, out in written.items():
        export(subject.folder / user, out, to=engine.format, base=str(subject.folder / "base"))
    return {user: str(out) for user, out in written.items()}


@each_engine
def test_answers_are_those_of_pytorch(
    engine: Engine, subject: Subject, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    asked = {
        "base": str(subject.folder / "base"),
        "gguf": str(subject.folder / "base.gguf"),
        "adapters": _exported(engine, subject, tmp_path),
        "prompts": subject.prompts,
        "new_tokens": NEW_TOKENS,
    }
    answer = engine.ask(asked, tmp_path)
    users = {user: _measured(subject, engine, user, answer["users"][user]) for user in USERS}
    if folder := pytestconfig.getoption("--engines", None):
        said = asdict(engine) | {key: answer[key] for key in ("versions", "together", "seconds")}
        write_json(Path(folder) / f"{engine.name}.json", {**said, "users": users, "provenance": provenance("cpu")})
    for user, measured in users.items():
        # else the base model alone might pass, whose log-probabilities are off by the tolerance too
        assert measured["effect"] > 2 * measured["tolerance"], (user, measured)
        assert measured["difference"] <= measured["tolerance"], (user, measured)
        assert measured["tokens_equal"] == measured["tokens"] or "float32" not in engine.precision, (user, measured)


def _measured(subject: Subject, engine: Engine, user: str, answered: list[Mapping[str, Any]]) -> dict[str, Any]:
    theirs, ours = [Continuation(**each) for each in answered], subject.continuations[user]
    pairs = [pair for a, b in zip(theirs, ours, strict=True) for pair in zip(a.tokens, b.tokens, strict=True)]
    return {
        "tokens": len(pairs),
        "tokens_equal": sum(a == b for a, b in pairs),
        "difference": subject.largest_difference(user, theirs),
        "tolerance": subject.tolerance(user, engine.precision, engine.running_sum),
        "effect": subject.effect(user),
    }


@each_engine
def test_the_lines_of_the_page_run(engine: Engine, subject: Subject, tmp_path: Path) -> None:
    """Of docs/export.md: in a folder with `base` or `base.gguf`, and ada's adapter as it was exported."""
    lines = engine.lines()
    for name in ("base", "base.gguf"):
        (tmp_path / name).symlink_to(subject.folder / name)
    _exported(engine, subject, tmp_path)
    (tmp_path / "lines.py").write_text(lines)
    printed = engine.run(tmp_path / "lines.py", tmp_path)
    (wanted,) = (subject.text("ada", prompt) for prompt in re.findall(r'"([^"]+\?)"', lines))
    assert wanted in printed
