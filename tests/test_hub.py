"""Adapters and banks on the Hub: what goes, what stays here, what the card says, and that what is there loads."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import CardData, HfApi, ModelCard, RepoCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import Trainer, TrainingArguments

from tests.bank.models import adapted, vector
from tests.format.saved import HEAD, LAYOUT, drop_header, reconfigure, relabel, save
from tests.tuner.models import base_model, config, logits, train_steps
from tests.uploads import Hub, stand_in
from uniproj import AdapterError, build, get, hub
from uniproj.bank import AdapterBank
from uniproj.bank.backup import forget_deleted
from uniproj.cli import main
from uniproj.format import CONFIG, WEIGHTS, Header, card, file
from uniproj.format.keys import OF_P
from uniproj.tuner import UniProjConfig

HERE = "/home/ada/models/llama"
SENT = {CONFIG, WEIGHTS, "README.md"}


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return stand_in(tmp_path / "cache", monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved adapter with a head."""
    save(tmp_path / "adapter", base_model_name_or_path=HERE, task_type="SEQ_CLS")
    return tmp_path / "adapter"


def _trained(name: str = HERE) -> PeftModel:
    base = base_model("llama")
    base.config._name_or_path = base.name_or_path = name
    model = get_peft_model(base, config("llama"))
    train_steps(model, "llama", 2)
    return model.eval()


def _code(text: str) -> list[str]:
    (found,) = re.findall(r"```python\n(.*?)\n```", text, flags=re.DOTALL)
    return found.splitlines()


def test_a_dry_run_says_what_would_go_and_writes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", lambda **_: pytest.fail("a client was made"))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    done = hub.push(folder, "someone/adapter", base_model="someone/base", dry_run=True)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert done.commit is None and done.files.keys() == SENT and done.kind == "model"
    data = ModelCard(done.card).data
    assert (data.library_name, data.base_model, data.pipeline_tag) == ("peft", "someone/base", "text-classification")
    assert {"uniproj", "unilora"} <= set(data.tags)
    # four modules of 24 x 16 at rank 3
    D, formula = 4 * 3 * (24 + 16), get("unilora").formula
    for said in (f"| d, D | 40, {D}: 1 to 12 |", f"`{formula}`", "40 numbers, and 6 beside P: `head.weight`", "arXiv"):
        assert said in done.card
    assert re.search(r"\| `isometric` \| holds: max\\\|P\^T P - I\\\| = \d", done.card)
    assert f"| file | {done.files[WEIGHTS]:,} bytes |" in done.card
    assert len(_code(done.card)) == 5 and "num_labels=2" in done.card


def test_the_lines_of_the_card_load_the_adapter_of_the_hub(uploads: Hub, tmp_path: Path) -> None:
    model = _trained("someone/base")
    base_model("llama").save_pretrained(tmp_path / "base")
    uploads.create_repo("someone/base", private=None, repo_type="model", exist_ok=True)
    uploads.upload_folder(repo_id="someone/base", folder_path=tmp_path / "base", repo_type="model")
    model.save_pretrained(tmp_path / "adapter")
    done = hub.push(tmp_path / "adapter", "someone/adapter")
    # nothing had to be changed, so the bytes are those that were scored
    assert uploads.files("someone/adapter")[WEIGHTS] == (tmp_path / "adapter" / WEIGHTS).read_bytes()
    found: dict[str, Any] = {}
    exec("\n".join(_code(done.card)), found)
    assert torch.equal(logits(found["model"].eval()), logits(model))


def test_push_to_hub_of_peft_carries_our_card_and_no_place_of_this_machine(uploads: Hub) -> None:
    model = _trained()
    commit = model.push_to_hub("adapter", private=True, tags=["mine"], commit_message="First", revision="v1")
    assert uploads.asked["private"] is True and uploads.asked["commit_message"] == "First"
    assert uploads.asked["branch"] == uploads.asked["revision"] == "v1" and "someone/adapter" in commit.commit_url
    files = uploads.files("someone/adapter")
    assert files.keys() == SENT and not [name for name, content in files.items() if b"ada/" in content]
    text = files["README.md"].decode()
    assert ModelCard(text).data.tags == ["uniproj", "unilora", "mine"] and ModelCard(text).data.base_model is None
    assert 'from_pretrained(base, "someone/adapter")' in text and "More Information Needed" not in text
    loaded = PeftModel.from_pretrained(base_model("llama"), "someone/adapter").eval()
    assert torch.equal(logits(loaded), logits(model))


def test_a_model_with_injected_adapters_goes_the_same_way(uploads: Hub) -> None:
    model = base_model("llama")
    model.add_adapter(config("llama"))
    train_steps(model, "llama", 2)
    done = model.push_to_hub("someone/injected", dry_run=True)
    assert done.files.keys() == SENT and uploads.asked == {}
    model.push_to_hub("someone/injected")
    again = base_model("llama")
    again.load_adapter("someone/injected")
    assert torch.equal(logits(again.eval()), logits(model.eval()))


def test_only_the_files_of_the_adapter_go(folder: Path, uploads: Hub) -> None:
    (folder / "checkpoint-1").mkdir()
    for name in ("optimizer.pt", ".lock", "training_args.bin", "checkpoint-1/adapter_model.bin"):
        (folder / name).write_bytes(b"private")
    (folder / "README.md").symlink_to(folder / "optimizer.pt")
    hub.push(folder, "someone/adapter")
    files = uploads.files("someone/adapter")
    assert files.keys() == SENT and b"private" not in files["README.md"]


def test_another_name_of_the_base_is_that_of_all_files(folder: Path, uploads: Hub) -> None:
    hub.push(folder, "someone/adapter", base_model="someone/base")
    there = uploads.folder("someone/adapter")
    assert json.loads((there / CONFIG).read_text())["base_model_name_or_path"] == "someone/base"
    saved, before = file.read(there), file.read(folder)
    assert saved.header is not None and saved.header.base_model == "someone/base"
    assert saved.header.identity == before.header.identity  # type: ignore[union-attr]
    assert all(torch.equal(tensor, before.tensors[name]) for name, tensor in saved.tensors.items())
    assert HEAD in saved.tensors


def test_a_card_that_somebody_changed_stays_here_and_there(folder: Path, uploads: Hub) -> None:
    first = hub.push(folder, "someone/adapter").card
    assert card.is_ours(first)
    changed = first.replace("# adapter", "# The adapter of Ada")
    readme = uploads.folder("someone/adapter") / "README.md"
    readme.unlink()
    readme.write_text(changed)
    again = hub.push(folder, "someone/adapter")
    assert readme.read_text() == changed == again.card and "README.md" not in again.files
    # one of the user's own in the folder is what he wants to upload, without the place that PEFT wrote into it
    own = f"---\nbase_model: {HERE}\nlicense: mit\ntags:\n- base_model:adapter:{HERE}\n- x\n---\n# Mine, on {HERE}\n"
    (folder / "README.md").write_text(own)
    hub.push(folder, "someone/adapter")
    assert readme.read_text() == "---\nlicense: mit\ntags:\n- x\n---\n# Mine, on llama\n"
    assert (folder / "README.md").read_text() == own


def test_saving_writes_our_card_and_leaves_one_of_the_users_own(tmp_path: Path) -> None:
    model, readme = _trained(), tmp_path / "README.md"
    model.save_pretrained(tmp_path)
    first = readme.read_text()
    assert card.is_ours(first) and "More Information Needed" not in first and "ada/" not in first
    assert ModelCard(first).data.library_name == "peft" and "| d, D | 60," in first
    model.save_pretrained(tmp_path)
    assert readme.read_text() == first
    readme.write_text("---\nlicense: mit\ntags:\n- x\n---\n# Mine\n")
    model.save_pretrained(tmp_path)
    kept = readme.read_text()
    assert "# Mine" in kept and "license: mit" in kept and "- x\n" in kept and "ada/" not in kept
    assert kept.count("import uniproj") == 1


def test_the_card_of_a_trainer_names_no_place_either(uploads: Hub, tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = Trainer(_trained(), arguments)
    trainer.save_model(str(tmp_path))
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "a fine-tuned version of llama on" in text and "ada/" not in text and text.count("import uniproj") == 1


HOSTILE = "q`|<img src=x>`[a](http://evil)\n## Mine"


def test_no_text_of_a_file_is_markup_on_the_card(folder: Path) -> None:
    def hostile(lines: dict[str, str]) -> dict[str, str]:
        return lines | {f"uniproj.{key}": json.dumps(HOSTILE) for key in ("base_quantisation", "library_version")}

    relabel(folder, hostile)
    reconfigure(folder, auto_mapping="mine")
    text = hub.push(folder, "someone/adapter", dry_run=True).card
    # a run of two backticks ends at the next run of two
    inside = r"q`\|<img src=x>`[a](http://evil)\\n## Mine".replace("\\\\", "\\")
    assert text.count(f"`` {inside} ``") == 2 and text.count("<img") == 2
    assert card.quoted(HOSTILE).startswith("`` q`|") and card.quoted("a``b") == "``` a``b ```"
    assert card.plain("a `b[0]` [c](d) <e> \\[f] `") == "a `b[0]` \\[c](d) \\<e> \\\\\\[f] \\`"


LONG = f"{HERE} of a name that is so long that YAML breaks it into lines wherever it has spaces"


@pytest.mark.parametrize(
    ("name", "given", "left"),
    [
        (
            HERE,
            {"base_model": [HERE], "model_name": f"{HERE}-x", "tags": [2026]},
            {"model_name": "llama-x", "tags": [2026]},
        ),
        (LONG, {"base_model": LONG, "tags": [f"base_model:adapter:{LONG}", "x"]}, {"tags": ["x"]}),
        (HERE, {"base_model": HERE, "model-index": [{"odd": 1}]}, {"model-index": [{"odd": 1}]}),
        ("llama", {"base_model": "llama", "tags": ["llama-3", "base_model:adapter:llama"]}, {"tags": ["llama-3"]}),
    ],
)
def test_the_place_of_a_base_leaves_the_metadata_of_a_card_and_nothing_else_does(
    name: str, given: dict[str, Any], left: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama").mkdir()
    monkeypatch.chdir(tmp_path)
    text = card.without_place(f"---\n{CardData(**given).to_yaml()}\n---\n# Mine\n", name)
    assert RepoCard(text).data.to_dict() == left


@pytest.mark.parametrize("head", ["", "---\n- a\n---\n", "---\n: [a\n---\n"])
def test_a_card_without_metadata_keeps_all_but_the_place(head: str) -> None:
    assert card.without_place(f"{head}# On {HERE}\n", HERE) == f"{head}# On llama\n"


def test_a_card_of_the_users_own_goes_byte_by_byte_and_no_tag_stops_a_save(folder: Path, uploads: Hub) -> None:
    own = b"---\r\ntags: [2026]\r\n---\r\n# Caf\xe9\r\n"
    (folder / "README.md").write_bytes(own)
    hub.push(folder, "someone/adapter")
    assert uploads.files("someone/adapter")["README.md"] == own
    (folder / "README.md").write_bytes(own.replace(b"\xe9", b"e"))
    _trained().save_pretrained(folder)
    assert "2026" in ModelCard.load(folder / "README.md").data.tags


def test_a_classifier_loads_with_its_labels_whatever_else_is_trained(tmp_path: Path) -> None:
    """On a base with a head of another size, beside two trained tokens."""
    base = base_model("bert")
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = "someone/base"
    base.classifier, base.num_labels, base.config.num_labels = torch.nn.Linear(32, 5), 5, 5
    model = get_peft_model(base, config("bert", trainable_token_indices=[5, 6]))
    model.save_pretrained(tmp_path / "adapter")
    assert "num_labels=5" in (tmp_path / "adapter" / "README.md").read_text()
    text = hub.push(tmp_path / "adapter", "someone/x", base_model="someone/base", dry_run=True).card
    lines = "\n".join(_code(text))
    assert "num_labels=5" in lines
    found: dict[str, Any] = {}
    exec(lines.replace("someone/base", str(tmp_path / "base")).replace("someone/x", str(tmp_path / "adapter")), found)
    assert torch.equal(logits(found["model"].eval(), "bert"), logits(model.eval(), "bert"))


def test_a_class_without_a_type_of_task_is_loaded_with_its_labels(folder: Path) -> None:
    mapping = {"base_model_class": "ViTForImageClassification", "parent_library": "transformers.models.vit.modeling"}
    header = replace(_header("unilora"), base_model="someone/base")
    lines = card.loading({"task_type": None, "auto_mapping": mapping}, "someone/x", header, 10).splitlines()
    assert lines[4].startswith('base = ViTForImageClassification.from_pretrained("someone/base", num_labels=10')


def test_a_model_of_which_no_adapter_is_left_is_pushed_by_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = base_model("llama")
    model.add_adapter(config("llama"), adapter_name="mine")
    model.delete_adapter("mine")
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: (_ for _ in ()).throw(OSError("theirs")))
    with pytest.raises(OSError, match="theirs"):
        model.push_to_hub("someone/bare")


def test_a_full_disk_is_said_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, base_model_name_or_path="someone/base")
    monkeypatch.setattr(shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(AdapterError, match=r"copied first, got .*No space left .* or set TMPDIR"):
        hub.push(tmp_path, "someone/adapter", dry_run=True)


def test_what_goes_is_what_was_checked_and_told_though_the_folder_changes_meanwhile(
    folder: Path, uploads: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another adapter, and then a file that is cut off, take the place of the one that was found first."""
    save(tmp_path / "other", "fastfood", base_model_name_or_path=HERE, task_type="SEQ_CLS")
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "other", cut)
    (cut / WEIGHTS).write_bytes((cut / WEIGHTS).read_bytes()[:-9])
    copyfile = shutil.copyfile
    for changed in (tmp_path / "other", cut):
        monkeypatch.setattr(shutil, "copyfile", lambda source, to, new=changed: copyfile(new / source.name, to))
        if changed == cut:
            with pytest.raises(AdapterError, match=rf"{WEIGHTS}.*must be"):
                hub.push(folder, "someone/cut", base_model="someone/base")
            assert not uploads.folder("someone/cut").exists()
        else:
            text = hub.push(folder, "someone/adapter", base_model="someone/base").card
            sent = file.read(uploads.folder("someone/adapter")).header
            assert sent is not None and sent.projection == "fastfood" and "| method | `fastfood`, version" in text


def test_of_several_adapters_in_a_folder_one_is_named(tmp_path: Path, uploads: Hub) -> None:
    model = get_peft_model(base_model("llama"), config("llama"), "mine")
    model.add_adapter("other", config("llama"))
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(AdapterError, match=r"Name the folder of one of the adapters in it: 'mine', 'other'\.$"):
        hub.push(tmp_path / "saved", "someone/adapter")
    assert hub.push(tmp_path / "saved" / "mine", "someone/adapter").files.keys() == SENT
    # the one that PEFT calls `default` lies in the folder itself, with its card
    model = _trained()
    model.add_adapter("other", config("llama", d=30))
    model.save_pretrained(tmp_path / "more")
    text = (tmp_path / "more" / "README.md").read_text()
    assert card.is_ours(text) and "| d, D | 60," in text
    assert "| d, D | 60," in hub.push(tmp_path / "more", "someone/default").card
    assert "| d, D | 30," in hub.push(tmp_path / "more" / "other", "someone/other").card


@pytest.mark.parametrize("name", ["a/b/c", "a b", "", "../x", "someone/a--b", "/home/ada/x"])
def test_no_repository_has_such_a_name(folder: Path, uploads: Hub, name: str) -> None:
    with pytest.raises(AdapterError, match=r"push: the repository must be the name .* such as user/name, got"):
        hub.push(folder, name, dry_run=True)
    with pytest.raises(AdapterError, match="base_model must be the name"):
        hub.push(folder, "someone/adapter", base_model=name or "/")


def test_what_cannot_go_is_refused_by_a_sentence(folder: Path, uploads: Hub, monkeypatch, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="must be a folder with"):
        hub.push(tmp_path / "nowhere", "someone/adapter")
    lora = get_peft_model(base_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="peft_type must be UNIPROJ, got 'LORA'"):
        hub.push(lora, "someone/adapter")
    two = _trained()
    two.add_adapter("other", config("llama"))
    with pytest.raises(AdapterError, match=r"holds one adapter, got .* with \['default', 'other'\]"):
        two.push_to_hub("someone/adapter")
    old, cut = (Path(shutil.copytree(folder, tmp_path / name)) for name in ("old", "cut"))
    (cut / WEIGHTS).write_bytes((cut / WEIGHTS).read_bytes()[:-9])
    with pytest.raises(AdapterError, match=rf"{WEIGHTS}.*must be"):
        hub.push(cut, "someone/adapter")
    drop_header(old)
    with pytest.raises(AdapterError, match="header"):
        hub.push(old, "someone/adapter")
    assert not uploads.cache.exists()
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(AdapterError, match=r"a token that may write someone/adapter .* Run `hf auth login`"):
        hub.push(folder, "someone/adapter")
    monkeypatch.setattr(uploads, "create_repo", lambda *_, **__: (_ for _ in ()).throw(OSError("403\n\nForbidden")))
    with pytest.raises(AdapterError, match=r"someone/adapter must be a repository .* got 403 Forbidden\. Check name"):
        hub.push(folder, "someone/adapter", token="hf_other")


def _header(projection: str) -> Header:
    """Of an adapter of this projection on LAYOUT."""
    size = {"d": 40} if get(projection).free_d else {}
    weights = {name: torch.randn(shape) for name, shape in LAYOUT.shapes().items()}
    more = {"base_weights": weights} if get(projection).needs_base_weights else {}
    fields = UniProjConfig(projection=projection, r=3, target_modules=["q", "v"], **size)
    return Header.of(fields.to_dict(), build(projection, layout=LAYOUT, **size, **more))


def test_measured_are_the_claims_of_this_very_P() -> None:
    P = hub.measured(_header("unilora_unnormalised"))
    assert not P["isometric"].holds and P["orthogonal"].holds  # type: ignore[union-attr]
    # made of the base's weights, which are not here
    assert set(hub.measured(_header("lora_xs")).values()) == {None}


def test_measured_of_a_learned_P_is_what_was_trained(tmp_path: Path) -> None:
    saved = save(tmp_path, "tied_lora")
    doubled = {name: 2 * value if name.startswith(OF_P) else value for name, value in saved.tensors.items()}
    assert saved.header is not None
    fresh, trained = (hub.measured(saved.header, each)["isometric"] for each in (saved.tensors, doubled))
    # P^T P = M I for M = 2 modules of a type; with scalers of 2 instead of 1 it is 4 M I
    assert fresh is not None and trained is not None
    assert fresh.value == pytest.approx(2 - 1) and trained.value == pytest.approx(4 * 2 - 1)


@pytest.mark.parametrize(
    ("projection", "kwargs", "said"),
    [
        ("unilora", {}, "theta_D = P theta_d, "),
        ("sparse", {}, "theta_D = P theta_d + c, "),
        ("tied_lora", {}, "P itself is trained"),
        ("tied_lora", {"trained": "AB"}, "P is made again from its seed"),
    ],
)
def test_a_card_says_what_is_added_and_what_of_P_is_trained(
    projection: str, kwargs: dict[str, Any], said: str, tmp_path: Path
) -> None:
    size = {"d": 40} if get(projection).free_d else {}
    P = build(projection, layout=LAYOUT, **size, **kwargs)
    fields = UniProjConfig(projection=projection, projection_kwargs=kwargs, r=3, **size).to_dict()
    assert said in card.of_adapter(Header.of(fields, P), fields, "someone/a", P.trained)


def test_a_bank_goes_whole_and_without_what_was_deleted(uploads: Hub, tmp_path: Path) -> None:
    model = adapted()
    model.get_base_model().config._name_or_path = model.get_base_model().name_or_path = HERE
    bank = AdapterBank.create(tmp_path / "bank", model)
    bank.add_many({f"user {i}": vector(i) for i in range(3)})
    bank.add("deleted long ago", vector(9))
    bank.delete("deleted long ago")
    assert bank.push_to_hub("someone/bank", dry_run=True).commit is None and not uploads.cache.exists()
    done = bank.push_to_hub("someone/bank")
    files = uploads.files("someone/bank")
    assert files.keys() == {"index.sqlite", "theta_d.safetensors", "README.md"} == done.files.keys()
    gone = (b"ada/", b"deleted", vector(9).numpy().tobytes())
    assert not [name for name, content in files.items() if any(each in content for each in gone)]
    text = files["README.md"].decode()
    assert "| adapters | 3 |" in text and "user 1" not in text and "| bytes of an adapter | 240 |" in text
    there = AdapterBank(uploads.folder("someone/bank"))
    assert there.names() == bank.names() and all(torch.equal(there.get(name), bank.get(name)) for name in bank)
    there.select(model, "user 2")


def test_a_copied_index_forgets_what_was_deleted(tmp_path: Path) -> None:
    """Also where SQLite leaves what is deleted in the file."""
    path = tmp_path / "index.sqlite"
    with closing(sqlite3.connect(path)) as index:
        index.executescript("PRAGMA secure_delete = OFF; CREATE TABLE adapters (name TEXT);")
        index.executescript("INSERT INTO adapters VALUES ('a user of long ago'); DELETE FROM adapters;")
    assert b"long ago" in path.read_bytes()
    forget_deleted(path)
    assert b"long ago" not in path.read_bytes()


def test_the_command(folder: Path, uploads: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(folder), "someone/adapter", "--base", "someone/base", "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["files"].keys() == SENT and not said["sent"] and said["url"] is None and "someone/base" in said["card"]
    assert not uploads.cache.exists()
    assert main(["push", str(folder), "someone/adapter", "--private"]) == 0
    assert "https://hub/someone/adapter" in capsys.readouterr().out and uploads.asked["private"] is True
    bank = AdapterBank.create(tmp_path / "bank", adapted())
    assert main(["push", str(bank.folder), "someone/bank", "--dry-run"]) == 0
    assert "| adapters | 0 |" in capsys.readouterr().out
    assert main(["push", str(tmp_path), "someone/adapter"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_header_of_what_went_is_readable_by_safetensors(folder: Path, uploads: Hub) -> None:
    hub.push(folder, "someone/adapter")
    with safe_open(os.fspath(uploads.folder("someone/adapter") / WEIGHTS), "pt") as tensors:
        assert tensors.metadata()["uniproj.base_model"] == "null"
