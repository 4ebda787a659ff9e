"""A projection is started by one command: in a copy of the checkout the tests pass with all that it wrote."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from uniproj import scaffold
from uniproj.cli import main
from uniproj.format.header import PLAIN_VERSION

ROOT = Path(__file__).parent.parent
NAME = "every_other"
GOLDEN = Path("tests", "golden", "checksums.json")


def _run(checkout: Path, *arguments: str) -> None:
    command = [sys.executable, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.system
def test_a_new_projection_is_in_the_tests_by_one_command(tmp_path: Path, monkeypatch, capsys) -> None:
    for folder in ("uniproj", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    monkeypatch.setattr(scaffold, "_ROOT", tmp_path)
    monkeypatch.setattr(scaffold, "_PROJECTIONS", tmp_path / "uniproj" / "projections")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with monkeypatch.context() as quicker:
        quicker.setattr(scaffold, "_KEEPERS", ("tests.test_golden",))
        assert main(["scaffold", NAME]) == 0
    first = json.loads((tmp_path / GOLDEN).read_text())
    assert [key for key in first if key.startswith(f"{NAME} v1")]
    assert json.loads((ROOT / GOLDEN).read_text()).items() <= first.items()

    # its author makes another P of it, and calls the command again: what was kept of the first P goes
    file = scaffold._PROJECTIONS / f"{NAME}.py"
    file.write_text(file.read_text().replace("torch.arange(self.D) % d", "torch.arange(self.D).flip(0) % d"))
    stale = tmp_path / "tests" / "fixtures" / "adapters" / f"v{PLAIN_VERSION}" / NAME / "of_the_first_P"
    stale.parent.mkdir()
    stale.touch()
    _run(tmp_path, "-m", "uniproj", "scaffold", NAME)
    assert not stale.exists()
    second = json.loads((tmp_path / GOLDEN).read_text())
    assert first.keys() == second.keys()
    assert {key for key in first if first[key] != second[key]} == {key for key in first if key.startswith(NAME)}
    tests = ["tests/test_golden.py", "tests/format/test_fixtures.py", "tests/test_battery.py"]
    _run(
        tmp_path, "-m", "pytest", "-o", "addopts=", *tests, "-k", f"{NAME} or golden or only_grow",
        "-p", "no:cacheprovider",
    )  # fmt: skip

    subprocess.run(["git", "add", str(file)], cwd=tmp_path, check=True)
    assert main(["scaffold", NAME]) == 2 and "is committed, so its P is part of results" in capsys.readouterr().err


def test_outside_a_checkout_the_file_is_a_plugin(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(scaffold, "_ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["scaffold", NAME]) == 0 and main(["check", NAME, "--plugins", f"{NAME}.py"]) == 0
    assert "ok   claim:isometric" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "message"), [("No-Name", "lower-case Python identifier"), ("vera", "is committed")])
def test_a_name_that_cannot_be_taken_is_refused(name: str, message: str, capsys) -> None:
    assert main(["scaffold", name]) == 2 and message in capsys.readouterr().err
