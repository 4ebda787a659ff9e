"""Adapters and folders of tables go to the Hub with a card, by the Hub's own client; a dry run says what would go.

What goes is copied first, the known files alone, and a place of the base model on this machine, which may tell who its
user is, goes with none of them. A README.md that somebody has changed, here or there, stays as it is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import EvalResult, HfApi, get_token
from torch import Tensor

from uniproj.claims import CHECKS, TOLERANCE, Measurement, isometry_error
from uniproj.console import report
from uniproj.errors import AdapterError
from uniproj.format import card, file
from uniproj.format.header import Header
from uniproj.format.keys import OF_P, OWN
from uniproj.registry import get

# entries D d of a P up to which every claim is decided from the dense matrix, and up to which P^T P is multiplied
_DENSE, _MULTIPLIED = 2**20, 2**26


@dataclass(frozen=True)
class Upload:
    """What went to the Hub, or in a dry run would go.

    kind: "model" or "dataset"; files: bytes by name; card: the README.md that is there then; commit: what the client
    says of it, None in a dry run.
    """

    repo: str
    kind: str
    files: Mapping[str, int]
    card: str
    commit: Any = None

    def show(self, as_json: bool) -> None:
        """Print it."""
        url = None if self.commit is None else str(getattr(self.commit, "commit_url", self.commit))
        facts = {"repo": self.repo, "kind": self.kind, "sent": self.commit is not None, "url": url}
        if as_json:
            print(json.dumps({**facts, "files": dict(self.files), "card": self.card}, indent=2))
            return
        report({**facts, "files": ", ".join(f"{name} {size:,}" for name, size in self.files.items())}, False)
        print(f"\n{self.card}")


def push(
    adapter: Any,
    repo: str,
    *,
    base_model: str | None = None,
    results: Sequence[EvalResult] = (),
    sections: Mapping[str, str] | None = None,
    tags: Sequence[str] = (),
    **options: Any,
) -> Upload:
    """Upload an adapter, a folder or a model that holds one, as a repository with a card.

    base_model: the name of its base on the Hub, where the adapter has none or that of a place on this machine;
    results, sections, tags: what the card says beyond the header; options: of `upload`. Raises AdapterError for what
    `uniproj.format.read` refuses, and as `upload` does.
    """
    with apart() as place:
        folder = Path(adapter) if isinstance(adapter, str | Path) else _saved(adapter, place / "saved")
        out = place / "out"
        file.read(folder)  # refuses by the name that the user knows
        _copy(folder, out)
        saved = file.read(out)  # what goes is what is checked, whoever writes to the folder meanwhile
        if saved.header is None:
            raise AdapterError(
                f"push: {folder} must hold a header of its P, got a file of an earlier format. "
                "Load it on its base with PeftModel.from_pretrained, and push the model."
            )
        header = card.published(saved.header, base_model)
        _rename_base(out, saved, header)
        beside = {name: tuple(tensor.shape) for name, tensor in saved.tensors.items() if not name.startswith(OWN)}
        trained = sum(tensor.numel() for name, tensor in saved.tensors.items() if name.startswith(OWN))
        size, decided = (out / file.WEIGHTS).stat().st_size, measured(header, saved.tensors)

        def write(name: str) -> str:
            known: dict[str, Any] = {"beside": beside, "size": size, "measured": decided, "results": results}
            return card.of_adapter(header, saved.config, name, trained, **known, sections=sections, tags=tags)

        return upload(out, repo, write, **options)


def upload(
    folder: Path,
    repo: str,
    write: Callable[[str], str],
    *,
    kind: str = "model",
    dry_run: bool = False,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool | None = None,
) -> Upload:
    """Upload all files of a folder, and the card that `write` makes of the repository's full name.

    A README.md in the folder goes as it is, and one on the Hub that is not as uniproj wrote it stays. The repository is
    made if there is none; options as those of `huggingface_hub.HfApi`. Raises AdapterError for a name that no
    repository can have, without a token, and for whatever the Hub refuses.
    """
    card.check_name(repo, "push: the repository")
    api: HfApi | None = None
    stays: str | None = None
    own = folder / card.CARD
    if not dry_run:
        api = _client(repo, token)
        with _refusals(repo):
            repo = api.create_repo(repo, private=private, repo_type=kind, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo, branch=revision, repo_type=kind, exist_ok=True)
            stays = None if own.exists() else _changed_card(api, repo, kind, revision)
    if stays is None and not own.exists():
        own.write_bytes(write(repo).encode())
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    done = Upload(repo, kind, files, own.read_text("utf-8", "replace") if stays is None else stays)
    if api is None:
        return done
    with _refusals(repo):
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            repo_type=kind,
            commit_message=commit_message or f"Upload {', '.join(files)}",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    return replace(done, commit=commit)


@contextmanager
def apart() -> Iterator[Path]:
    """A temporary folder for what goes. Raises AdapterError where it cannot be written, or what goes cannot be read."""
    try:
        with TemporaryDirectory() as folder:
            yield Path(folder)
    except OSError as error:
        raise AdapterError(
            f"push: what goes must be readable, and be copied first, got {error}. Free some space, or set TMPDIR to a "
            "folder with more."
        ) from error


def measured(header: Header, trained: Mapping[str, Tensor] | None = None) -> dict[str, Measurement | None]:
    """The claims of P, and whether it is isometric, each decided from P itself; None where that takes more than seconds
    or the weights of the base. trained: the tensors of the adapter, with the numbers of a learned P."""
    cls, size = get(header.projection), header.layout.D * header.d
    if cls.needs_base_weights or cls.draws(header.layout, header.d, **header.projection_kwargs) > _MULTIPLIED:
        return dict.fromkeys(sorted(cls.claims))
    P = header.build(where="push")
    if trained is not None:
        P.load_state_dict({key.removeprefix(OF_P): own for key, own in trained.items() if key.startswith(OF_P)})
    claims = sorted({*P.claims, "isometric"})
    if size <= _DENSE:
        return {claim: CHECKS[claim](P) for claim in claims}
    found: dict[str, Measurement | None] = dict.fromkeys(claims)
    if P.sparse or size <= _MULTIPLIED:
        error = isometry_error(P)
        found["isometric"] = Measurement(error <= TOLERANCE, error, "max|P^T P - I|")
    elif "isometric" not in P.claims:
        del found["isometric"]
    return found


def _saved(model: Any, folder: Path) -> Path:
    """The folder of the one adapter of a model, which is saved for it."""
    names = list(getattr(model, "peft_config", None) or ())
    if len(names) != 1:
        raise AdapterError(
            f"push: a repository holds one adapter, got a {type(model).__name__} with {names}. Save it with "
            "save_pretrained, and push the folder of one of them."
        )
    model.save_pretrained(str(folder))
    return folder / names[0] if (folder / names[0]).is_dir() else folder


def _copy(folder: Path, out: Path) -> None:
    """The files of an adapter that may go, with a card that lies beside them, as they are."""
    out.mkdir()
    own = folder / card.CARD
    has_card = own.is_file() and not own.is_symlink()
    for name in (file.CONFIG, file.WEIGHTS, *([card.CARD] if has_card else [])):
        shutil.copyfile(folder / name, out / name)


def _rename_base(out: Path, saved: file.SavedAdapter, header: Header) -> None:
    """Give copied files the name of the base that `header` has: they are written anew where it is another, a card of
    the user's own loses the old one, and one of ours goes, since it is made anew."""
    assert saved.header is not None
    named: set[str | None] = {saved.header.base_model, saved.config.get("base_model_name_or_path")}
    if named != {header.base_model}:
        file.write(out, saved.tensors, header, {**saved.config, "base_model_name_or_path": header.base_model})
    own = out / card.CARD
    if not own.exists():
        return
    known = text = own.read_text("utf-8", "replace")
    if card.is_ours(known):
        own.unlink()
        return
    for place in named:
        text = card.without_place(text, place)
    if text != known:
        own.write_bytes(text.encode())


def _client(repo: str, token: str | bool | None) -> HfApi:
    if token in (None, True) and get_token() is None:
        raise AdapterError(
            f"push: a token that may write {repo} must be known, got none. Run `hf auth login` or set HF_TOKEN; a dry "
            "run needs none."
        )
    return HfApi(token=token)


def _changed_card(api: HfApi, repo: str, kind: str, revision: str | None) -> str | None:
    """The card of a repository, if somebody has changed it since uniproj wrote it."""
    where: dict[str, Any] = {"repo_id": repo, "filename": card.CARD, "repo_type": kind, "revision": revision}
    if not api.file_exists(**where):
        return None
    text = Path(api.hf_hub_download(**where)).read_text("utf-8", "replace")
    return None if card.is_ours(text) else text


@contextmanager
def _refusals(repo: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # no network, no such user, no right to write: a library with many kinds of error
        raise AdapterError(
            f"push: {repo} must be a repository that can be reached and that your token may write, got "
            f"{' '.join(str(error).split())[:300]}. Check name, token (`hf auth whoami`) and network, then push again."
        ) from error
