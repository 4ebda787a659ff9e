"""What stands in the place of an adapter's folder and files."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.format.saved import save
from uniproj import AdapterError
from uniproj.format import file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path)
    return tmp_path


def test_a_file_that_can_run_code_stays_closed(folder: Path, monkeypatch) -> None:
    (folder / file.WEIGHTS).rename(folder / file.UNSAFE)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(AdapterError, match=r"got adapter_model\.bin, which can run code .* Save the adapter as safet"):
        file.read(folder)


def test_what_is_no_folder_or_no_regular_file_is_refused(folder: Path) -> None:
    with pytest.raises(AdapterError, match="must be a folder"):
        file.read(folder / file.WEIGHTS)
    with pytest.raises(AdapterError, match="must be a folder"):
        file.read(folder / "nowhere")
    for name in (file.WEIGHTS, file.CONFIG):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(AdapterError, match=rf"got no {re.escape(name)}"):
            file.read(folder)
        for make in (os.mkfifo, os.mkdir):  # reading a pipe would wait for ever
            make(folder / name)
            with pytest.raises(AdapterError, match="must be a regular file"):
                file.read(folder)
            assert file.has_our_weights(folder) == (name == file.CONFIG)
            assert file.has_our_config(folder) == (name == file.WEIGHTS)
            (os.unlink if make is os.mkfifo else os.rmdir)(folder / name)
        (folder / name).write_bytes(content)


def test_links_to_regular_files_are_read(folder: Path, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    for name in (file.CONFIG, file.WEIGHTS):
        (links / name).symlink_to(folder / name)
    assert file.read(links).header == file.read(folder).header


def test_weights_of_another_method_are_refused(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "other", "fastfood")
    shutil.copy(tmp_path / "other" / file.WEIGHTS, folder / file.WEIGHTS)
    with pytest.raises(AdapterError, match="projection must be 'fastfood' as in the header"):
        file.read(folder)


def test_a_repository_of_the_hub_is_read_from_its_cache(folder: Path, monkeypatch) -> None:
    asked = []

    def download(repository: str, name: str, subfolder: str | None = None, **options) -> str:
        asked.append((repository, name, subfolder, options))
        return str(folder / name)

    monkeypatch.setattr(file, "hf_hub_download", download)
    assert file.locate("an/adapter", subfolder="best", revision="v2") == folder
    assert asked == [("an/adapter", name, "best", {"revision": "v2"}) for name in (file.CONFIG, file.WEIGHTS)]
    monkeypatch.setattr(file, "hf_hub_download", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(AdapterError, match=r"an/adapter: must be a folder or a repository .* got offline"):
        file.locate("an/adapter")
