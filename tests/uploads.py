"""A stand-in for the Hub: what is uploaded lies in a cache as huggingface_hub keeps one, from which its own functions,
PEFT's and Transformers' then load without a network."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

from uniproj import hub

_COMMIT = "0" * 40


class Hub:
    """In the place of `HfApi`: takes the calls that it takes, by the same names, and writes to the cache."""

    def __init__(self, cache: Path):
        self.cache, self.asked = cache, {}

    def __call__(self, token: Any = None) -> Hub:
        return self

    def folder(self, repo: str, kind: str = "model") -> Path:
        """What a repository holds."""
        return self.cache / f"{kind}s--{repo.replace('/', '--')}" / "snapshots" / _COMMIT

    def create_repo(self, repo_id: str, *, private: bool | None, repo_type: str, exist_ok: bool) -> Any:
        self.asked |= {"private": private}
        name = repo_id if "/" in repo_id else f"someone/{repo_id}"
        refs = self.folder(name, repo_type).parents[1] / "refs"
        refs.mkdir(parents=True, exist_ok=exist_ok)
        (refs / "main").write_text(_COMMIT)
        return SimpleNamespace(repo_id=name)

    def create_branch(self, repo_id: str, *, branch: str, repo_type: str, exist_ok: bool) -> None:
        self.asked |= {"branch": branch}

    def file_exists(self, repo_id: str, filename: str, *, repo_type: str, revision: str | None) -> bool:
        return (self.folder(repo_id, repo_type) / filename).is_file()

    def hf_hub_download(self, repo_id: str, filename: str, *, repo_type: str, revision: str | None) -> str:
        return str(self.folder(repo_id, repo_type) / filename)

    def upload_folder(self, *, repo_id: str, folder_path: Path, repo_type: str, **said: Any) -> Any:
        """Each file as the cache has it: a link to its bytes."""
        self.asked |= said
        to = self.folder(repo_id, repo_type)
        for path in folder_path.rglob("*"):
            content, link = path.read_bytes(), to / path.relative_to(folder_path)
            blob = to.parents[1] / "blobs" / hashlib.sha256(content).hexdigest()
            for each in (blob, link):
                each.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            link.unlink(missing_ok=True)
            link.symlink_to(blob)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/{_COMMIT}")

    def files(self, repo: str, kind: str = "model") -> dict[str, bytes]:
        """The content of a repository, by name."""
        folder = self.folder(repo, kind)
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")}


def stand_in(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A new one, for whoever uploads and loads in this test."""
    found = Hub(cache)
    monkeypatch.setattr(hub, "HfApi", found)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_of_a_test")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return found
