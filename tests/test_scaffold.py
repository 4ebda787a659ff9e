"""A projection is started by one command: in a copy of the checkout the tests pass with all that it wrote."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAME = "every_other"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for folder in ("uniproj", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    return tmp_path


def _run(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)


def test_a_new_projection_is_in_the_tests_by_one_command(checkout: Path) -> None:
    made = _run(checkout, "-m", "uniproj", "scaffold", NAME)
    assert made.returncode == 0, made.stderr
    file = checkout / "uniproj" / "projections" / f"{NAME}.py"
    golden = checkout / "tests" / "golden" / "checksums.json"
    first = json.loads(golden.read_text())
    assert [key for key in first if key.startswith(f"{NAME} v1")] and (
        json.loads((ROOT / "tests" / "golden" / "checksums.json").read_text()).items() <= first.items()
    )

    # its author makes another P of it, and calls the command again
    file.write_text(file.read_text().replace("torch.arange(self.D) % d", "torch.arange(self.D).flip(0) % d"))
    assert _run(checkout, "-m", "uniproj", "scaffold", NAME).returncode == 0
    second = json.loads(golden.read_text())
    assert first.keys() == second.keys()
    assert {key for key in first if first[key] != second[key]} == {key for key in first if key.startswith(NAME)}
    selected = "every_other or golden or only_grow"
    tests = ["tests/test_golden.py", "tests/format/test_fixtures.py", "tests/test_battery.py"]
    ended = _run(checkout, "-m", "pytest", "-o", "addopts=", *tests, "-k", selected, "-p", "no:cacheprovider")
    assert ended.returncode == 0, ended.stdout[-2000:]

    subprocess.run(["git", "add", str(file)], cwd=checkout, check=True)
    refused = _run(checkout, "-m", "uniproj", "scaffold", NAME)
    assert refused.returncode == 2 and "is committed, so its P is part of results" in refused.stderr


@pytest.mark.parametrize(("name", "message"), [("No-Name", "lower-case Python identifier"), ("vera", "is committed")])
def test_a_name_that_cannot_be_taken_is_refused(name: str, message: str) -> None:
    refused = _run(ROOT, "-m", "uniproj", "scaffold", name)
    assert refused.returncode == 2 and message in refused.stderr
