"""A crash or a full disk while an adapter is written leaves the one of before."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.forked import found_in_child
from tests.format.saved import drop_header, edit_weights, relabel, save
from uniproj import AdapterError
from uniproj.cli import main
from uniproj.exchange.restore import restore
from uniproj.format import disk, file


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("call", "error"), [("fsync", errno.ENOSPC), ("replace", errno.EIO)])
@pytest.mark.parametrize("nth", [0, 1])
def test_a_disk_that_refuses_leaves_the_old_file(folder: Path, monkeypatch, call: str, error: int, nth: int) -> None:
    before, original, calls = _contents(folder), getattr(os, call), []

    def refuse(*args):
        calls.append(args)
        if len(calls) > nth:
            raise OSError(error, os.strerror(error))
        return original(*args)

    monkeypatch.setattr(os, call, refuse)
    state = "What was saved there before is intact" if call == "fsync" else "Each file there is whole"
    with pytest.raises(AdapterError, match=state):
        save(folder, "fastfood")
    monkeypatch.undo()
    now = _contents(folder)
    assert now.keys() == before.keys()
    if call == "fsync" or nth == 0:
        assert now == before and file.read(folder).config["projection"] == "unilora"
    else:  # between the two renames: each file is whole, and the pair is refused rather than mixed
        assert now[file.CONFIG] == before[file.CONFIG]
        with pytest.raises(AdapterError, match=f"as in the header.*uniproj restore {folder}"):
            file.read(folder)
        assert restore(folder).projection == "fastfood"
        save(folder / "again", "fastfood")
        assert (folder / file.CONFIG).read_bytes() == (folder / "again" / file.CONFIG).read_bytes()


def test_a_configuration_is_restored_from_the_header(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _contents(folder)
    for damage in (
        Path.unlink,
        lambda path: path.write_text("{"),
        lambda path: path.write_text('{"peft_type": "LORA"}'),
    ):
        damage(folder / file.CONFIG)
        with pytest.raises(AdapterError):
            file.read(folder)
        assert main(["restore", str(folder)]) == 0 and "unilora, d = 40" in capsys.readouterr().out
        assert _contents(folder) == before


def _with_seed(header: dict[str, Any], seed: str) -> dict[str, Any]:
    return {**header, "__metadata__": {**header["__metadata__"], "uniproj.projection_seed": seed}}


def test_a_configuration_is_not_restored_from_altered_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / file.CONFIG).read_bytes()
    relabel(folder, lambda metadata: {**metadata, "uniproj.projection_version": "1"})
    assert main(["restore", str(folder)]) == 2 and "must be of version" in capsys.readouterr().err
    save(folder)
    edit_weights(folder, lambda header, tensors: (_with_seed(header, "8"), tensors))
    assert main(["restore", str(folder)]) == 2 and "altered" in capsys.readouterr().err
    drop_header(folder)
    assert main(["restore", str(folder)]) == 2 and "must hold the header" in capsys.readouterr().err
    assert (folder / file.CONFIG).read_bytes() == before


def test_a_file_that_may_not_grow_leaves_the_old_one(folder: Path) -> None:
    """The operating system itself refuses bytes beyond 1 kB, as it does on a full disk."""
    before = _contents(folder)

    def limited() -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(AdapterError) as error:
            disk.replace({folder / file.WEIGHTS: bytes(5000), folder / file.CONFIG: b"x"})
        return str(error.value)

    assert "What was saved there before is intact" in found_in_child(limited)
    assert _contents(folder) == before
