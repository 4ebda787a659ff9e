"""An engine is one script: what it needs to be installed, the format it reads, and how it is asked.

The head of a script (PEP 723) pins the packages of its environment; its table `[tool.uniproj]` has the fields of
`Engine`. `answer(asked)` runs in that environment, where uniproj is not installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOME = Path(__file__).parent
ROOT = HOME.parents[1]
ENVIRONMENTS = ROOT / "build" / "engines"
_HEAD = re.compile(r"(?m)^# /// script$\s(?P<lines>(^#(| .*)$\s)+)^# ///$")


@dataclass(frozen=True)
class Engine:
    """label: as it calls itself, and the heading of its lines in docs/export.md; format: of `export`; answers: with
    tokens, as `tests.engines.subject` asks for them, or with something else, for a test of its own.

    precision: with what the engine multiplies (`tests.engines.subject.PRECISIONS`); running_sum: whether it adds the
    probabilities of all tokens one after another in float32; packages: that it names in its record; dependencies:
    pinned, what is installed; removed: what is taken out again; environment: variables.
    """

    name: str
    label: str
    format: str
    precision: str
    packages: Sequence[str]
    dependencies: Sequence[str]
    answers: str = "tokens"
    running_sum: bool = False
    removed: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, script: Path) -> Engine:
        """What the head of a script says."""
        head = _HEAD.search(script.read_text())
        assert head, f"{script} must begin with a head of PEP 723"
        said = tomllib.loads("".join(line[2:] for line in head["lines"].splitlines(keepends=True)))
        return cls(script.stem, dependencies=said["dependencies"], **said["tool"]["uniproj"])

    @property
    def script(self) -> Path:
        return HOME / "scripts" / f"{self.name}.py"

    def lines(self) -> str:
        """The Python that docs/export.md has for it; where it has two blocks, the first is run once for a base."""
        section = (ROOT / "docs" / "export.md").read_text().split(f"\n### {self.label}\n")[1].split("\n##")[0]
        *once, lines = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
        assert len(lines.strip().splitlines()) <= 11 and len(once) <= 1
        return "".join([*once, lines])

    def install(self) -> Path:
        """The Python of the engine's environment, which is made once for a head."""
        wanted = hashlib.sha256(json.dumps([*self.dependencies, *self.removed]).encode()).hexdigest()
        place = ENVIRONMENTS / self.name
        done = place / ".done"
        if not done.exists() or done.read_text() != wanted:
            python = new_environment(place)
            pip(python, "install", *self.dependencies)
            if self.removed:
                pip(python, "uninstall", "--yes", *self.removed)
            done.write_text(wanted)
        return python_of(place)

    def ask(self, asked: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """What the script's `answer` returns, in the engine's environment and in `folder`."""
        (folder / "asked.json").write_text(json.dumps(asked))
        self.run(HOME / "asking.py", folder, self.script, "asked.json", "answer.json", *self.packages)
        return json.loads((folder / "answer.json").read_text())

    def run(self, script: Path, folder: Path, *arguments: object) -> str:
        """What a script prints, in the engine's environment and in `folder`; -P: no file beside it hides a package."""
        done = subprocess.run(
            [self.install(), "-P", script, *map(str, arguments)],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **self.environment, "PYTHONPATH": ""},
            capture_output=True,
            text=True,
        )
        assert not done.returncode, f"{self.label}: {done.stdout[-2000:]}{done.stderr[-8000:]}"
        return done.stdout


def new_environment(place: Path) -> Path:
    """The Python of an environment without packages, in place of one that was there."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
    return python_of(place)


def python_of(place: Path) -> Path:
    return place / "bin" / "python"


def pip(python: Path, *arguments: str) -> None:
    # -I: what lies on PYTHONPATH would count as installed
    subprocess.run([python, "-I", "-m", "pip", "--quiet", *arguments], check=True)


ENGINES = {script.stem: Engine.of(script) for script in sorted((HOME / "scripts").glob("*.py"))}
TALKING = {name: engine for name, engine in ENGINES.items() if engine.answers == "tokens"}
