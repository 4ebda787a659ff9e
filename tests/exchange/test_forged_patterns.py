"""Files of strangers whose patterns keep `re` busy for ever: they load rightly, or are refused in a sentence."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel, UniLoraConfig, get_peft_model
from peft.tuners.lora import LoraModel
from safetensors.torch import save_file

from tests.exchange.tools import logits
from tests.format.test_patterns import HANGS_BOTH, HANGS_RE
from tests.tuner.models import TARGETS, base_model, config, train_steps
from uniproj import AdapterError
from uniproj.bank import AdapterBank
from uniproj.exchange import export, import_adapter
from uniproj.exchange.verify import verify
from uniproj.format import file, identity, patterns
from uniproj.format.keys import IDENTITY, THETA_D
from uniproj.format.tensors import serialise
from uniproj.tuner import UniProjConfig

ALTERNATIVE = f"{HANGS_RE}|.*({'|'.join(TARGETS['llama'])})"
FIELDS = {
    "target_modules": lambda alone, whole: {"target_modules": whole},
    "rank_pattern": lambda alone, _: {"rank_pattern": {alone: 2}},
    "alpha_pattern": lambda alone, _: {"alpha_pattern": {alone: 2}},
    "exclude_modules": lambda alone, _: {"exclude_modules": alone},
    "modules_to_save": lambda alone, _: {"modules_to_save": [alone]},
    "layers_pattern": lambda alone, _: {"layers_to_transform": [0, 1], "layers_pattern": [alone, "layers"]},
}
# what a method's configuration has of these, and what an import must match: a LORA's tensors name its modules
OF_KIND = {"lora": [*FIELDS], "unilora": ["target_modules", "modules_to_save", "layers_pattern"]}
MATCHED = {"lora": ["rank_pattern", "alpha_pattern"], "unilora": OF_KIND["unilora"]}


def _fields(folder: Path) -> dict[str, Any]:
    return json.loads((folder / file.CONFIG).read_text())


def _forge(own: Path, folder: Path, changes: Mapping[str, Any]) -> None:
    """An adapter whose header, digest, identity and configuration agree on other settings."""
    saved = file.read(own)
    assert saved.header is not None
    header = dataclasses.replace(saved.header, settings={**saved.header.settings, **changes})
    # the identity holds the scales that the patterns gave: those of before, as these fit no module
    tensors = {**saved.tensors, IDENTITY: identity.encode(saved.header)}
    folder.mkdir(parents=True)
    (folder / file.WEIGHTS).write_bytes(serialise(tensors, header.to_metadata()))
    (folder / file.CONFIG).write_text(file.config_text({**_fields(own), **changes}))


def _change(own: Path, folder: Path, changes: Mapping[str, Any]) -> None:
    shutil.copytree(own, folder)
    (folder / file.CONFIG).write_text(json.dumps({**_fields(own), **changes}))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base model, and adapters of it."""
    place = tmp_path_factory.mktemp("forged")
    base_model("llama").save_pretrained(place / "base")
    model = get_peft_model(base_model("llama"), config("llama"))
    train_steps(model, "llama", 2)
    model.save_pretrained(place / "own")
    export(place / "own", place / "lora")
    theirs = UniLoraConfig(r=4, theta_d_length=60, target_modules=TARGETS["llama"], task_type="CAUSAL_LM")
    get_peft_model(base_model("llama"), theirs).save_pretrained(place / "unilora")
    return place


@contextmanager
def _cpu_seconds(most: float) -> Iterator[None]:
    """Raises TimeoutError inside after so much CPU time, also during a match of `re`, which lets signals through."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, most)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def test_re_does_not_end_on_these_patterns() -> None:
    for pattern in (HANGS_RE, ALTERNATIVE):
        for match, whole in ((re.fullmatch, pattern), (re.match, f"(.*[.])?({pattern})$")):
            with pytest.raises(TimeoutError), _cpu_seconds(0.1):
                match(whole, "model.layers.0.self_attn.k_proj")


@pytest.mark.parametrize("changes", [{"r": 10**9}, {"rank_pattern": {".*": 10**9}}, {"target_modules": ["nowhere"]}])
def test_a_configuration_that_does_not_fit_is_refused_before_anything_is_made(
    changes: dict[str, Any], place: Path, tmp_path: Path, monkeypatch
) -> None:
    _forge(place / "own", tmp_path / "forged", changes)
    monkeypatch.setattr(LoraModel, "_create_and_replace", lambda *_, **__: pytest.fail("PEFT made a layer"))
    said = r"modules called \{'nowhere'\}" if "target_modules" in changes else r"\(rank\) = \(4\), got \(1000000000\)"
    model = base_model("llama")
    for use in (
        lambda: PeftModel.from_pretrained(model, tmp_path / "forged"),
        lambda: verify(tmp_path / "forged", str(place / "base")),
        lambda: export(tmp_path / "forged", tmp_path / "out", base=str(place / "base")),
    ):
        with pytest.raises(AdapterError, match=said):
            use()
    assert not any("lora" in name for name, _ in model.named_modules()) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", FIELDS)
def test_what_is_no_pattern_is_refused_by_name(field: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=rf"{field}: every pattern must be a regular expression, got '\('"):
        _forge(place / "own", tmp_path / "forged", FIELDS[field]("(", "("))
        PeftModel.from_pretrained(base_model("llama"), tmp_path / "forged")
    for kind in ("lora", "unilora"):
        _change(place / kind, tmp_path / kind, FIELDS[field]("(", "("))
        if field in MATCHED[kind]:
            with pytest.raises(AdapterError, match=f"{field}: every pattern must be"):
                import_adapter(tmp_path / kind, tmp_path / "out", base=str(place / "base"))


def _logits(model: PeftModel) -> list[float]:
    return logits(model.eval(), "llama").flatten().tolist()


def _loaded(folder: Path, again: Path) -> list[float]:
    model = PeftModel.from_pretrained(base_model("llama"), folder)
    model.save_pretrained(again)
    return _logits(model)


def _beside(folder: Path, own: Path) -> list[float]:
    model = PeftModel.from_pretrained(base_model("llama"), own)
    model.load_adapter(folder, "other")
    model.set_adapter("other")
    return _logits(model)


def _in_bank(folder: Path, own: Path, out: Path) -> list[str]:
    bank = AdapterBank.create(out, own)
    bank.add("user", folder)
    return bank.names()


def _ended(act: Callable[[], Any]) -> Any:
    with _cpu_seconds(60):
        try:
            return act()
        except AdapterError as error:
            return f"refused: {error}"


def _uses(place: Path, field: str, alone: str, whole: str, folder: Path) -> dict[str, Any]:
    """What came of each use of adapters, saved by every kind of writer, whose configurations have these patterns."""
    changes, base, own = FIELDS[field](alone, whole), str(place / "base"), _fields(place / "own")
    ours, old, template = (folder / name for name in ("ours", "old", "template"))
    _forge(place / "own", ours, changes)
    for written in (old, template):
        written.mkdir()
    fresh = dict.fromkeys(("layout_fingerprint", "projection_checksum", "format_version"))
    (template / file.CONFIG).write_text(json.dumps({**own, **changes, **fresh}))
    (old / file.CONFIG).write_text(json.dumps({**own, **changes, "format_version": None}))
    save_file({THETA_D: file.read(place / "own").theta_d}, old / file.WEIGHTS)

    def fresh_names() -> list[str]:
        model = get_peft_model(base_model("llama"), UniProjConfig.from_pretrained(template))
        return sorted(model.base_model.targeted_module_names)

    uses = {
        "from_pretrained": lambda: _loaded(ours, folder / "again"),
        "load_adapter": lambda: _beside(ours, place / "own"),
        "verify": lambda: verify(ours, base) and "held",
        "export": lambda: export(ours, folder / "out", base=base) or "written",
        "bank": lambda: _in_bank(ours, place / "own", folder / "bank"),
        "old": lambda: _loaded(old, folder / "old_again"),
        "template": fresh_names,
    }
    for kind, fields in OF_KIND.items():
        if field in fields:
            _change(place / kind, folder / kind, changes)
            into = folder / f"of_{kind}"
            uses[kind] = lambda kind=kind, into=into: import_adapter(folder / kind, into, base=base)["lost_energy"]
    return {use: _ended(act) for use, act in uses.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("field", FIELDS)
def test_a_pattern_that_can_be_matched_changes_nothing(field: str, place: Path, tmp_path: Path) -> None:
    own = PeftModel.from_pretrained(base_model("llama"), place / "own")
    found = _uses(place, field, HANGS_RE, ALTERNATIVE, tmp_path)
    assert found["from_pretrained"] == found["load_adapter"] == found["old"] == _logits(own)
    assert (found["verify"], found["export"]) == ("held", "written")
    assert found["bank"] == ["user"] or (field == "modules_to_save" and "must train theta_d alone" in found["bank"])
    assert found["template"] == sorted(own.base_model.targeted_module_names)
    for name in (file.WEIGHTS, file.CONFIG):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    for kind in OF_KIND.keys() & found.keys():
        assert found[kind] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("field", FIELDS)
def test_a_pattern_that_takes_too_long_is_refused_by_name(field: str, place: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    found = _uses(place, field, HANGS_BOTH, HANGS_BOTH, tmp_path)
    if field != "alpha_pattern":  # which alone is part of what makes an update
        in_bank = found.pop("bank")
        assert in_bank == ["user"] or (field == "modules_to_save" and "must train theta_d alone" in in_bank)
    for kind in OF_KIND.keys() & found.keys():
        if field not in MATCHED[kind]:
            assert found.pop(kind) == pytest.approx(0.0, abs=1e-9)
    sentence = f"{field}: all patterns must be matched within 0."
    assert {use: end for use, end in found.items() if sentence not in end} == {}
