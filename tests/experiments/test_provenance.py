"""Records name the commit of the code that made them, and say where that code was changed since."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from experiments import provenance


def _git(folder: Path, *arguments: str) -> None:
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *author, *arguments], cwd=folder, check=True, capture_output=True)


def test_changed_code_is_dirty_and_new_records_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, record = tmp_path / "experiments" / "provenance.py", tmp_path / "results" / "bank" / "bank.json"
    monkeypatch.setattr(provenance, "__file__", str(code))
    for path in (code, record):
        path.parent.mkdir(parents=True)
        path.write_text("1")
    assert provenance.commit() is None
    _git(tmp_path, "init")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-m", "first")
    clean = provenance.commit()
    assert clean is not None and len(clean) == 12
    record.write_text("2")
    assert provenance.commit() == clean
    code.write_text("2")
    assert provenance.commit() == f"{clean}-dirty"
