"""Files of strangers whose patterns keep `re` busy for ever: they load rightly, or are refused in a sentence."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, UniLoraConfig, get_peft_model
from peft.tuners.lora import LoraModel
from safetensors.torch import save_file

from tests.format.test_patterns import HANGS_BOTH, HANGS_RE
from tests.tuner.models import TARGETS, base_model, batch, config, train_steps
from uniproj import AdapterError
from uniproj.exchange import export, import_adapter
from uniproj.exchange.verify import verify
from uniproj.format import file, identity
from uniproj.format.keys import IDENTITY, THETA_D
from uniproj.format.tensors import serialise

ROOT = Path(__file__).parents[2]
ALTERNATIVE = f"{HANGS_RE}|.*({'|'.join(TARGETS['llama'])})"
PATTERNS = {"ends": (HANGS_RE, ALTERNATIVE), "endless": (HANGS_BOTH, HANGS_BOTH)}
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


@pytest.mark.parametrize("changes", [{"r": 10**9}, {"rank_pattern": {".*": 10**9}}, {"target_modules": ["nowhere"]}])
def test_a_configuration_that_does_not_fit_is_refused_before_anything_is_made(
    changes: dict[str, Any], place: Path, tmp_path: Path, monkeypatch
) -> None:
    _forge(place / "own", tmp_path / "forged", changes)
    monkeypatch.setattr(LoraModel, "_create_and_replace", lambda *_, **__: pytest.fail("PEFT made a layer"))
    said = (
        r"linear modules called \{'nowhere'\}"
        if "target_modules" in changes
        else r"\(rank\) = \(4\), got \(1000000000\)"
    )
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


def _change(own: Path, folder: Path, changes: Mapping[str, Any]) -> None:
    shutil.copytree(own, folder)
    (folder / file.CONFIG).write_text(json.dumps({**_fields(own), **changes}))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base model, adapters of it, and forged copies of them."""
    place = tmp_path_factory.mktemp("forged")
    base_model("llama").save_pretrained(place / "base")
    model = get_peft_model(base_model("llama"), config("llama"))
    train_steps(model, "llama", 2)
    model.save_pretrained(place / "own")
    export(place / "own", place / "lora")
    theirs = UniLoraConfig(r=4, theta_d_length=60, target_modules=TARGETS["llama"], task_type="CAUSAL_LM")
    get_peft_model(base_model("llama"), theirs).save_pretrained(place / "unilora")
    own = _fields(place / "own")
    for kind, patterns in PATTERNS.items():
        for field, of in FIELDS.items():
            _forge(place / "own", place / "forged" / f"uniproj-{field}-{kind}", of(*patterns))
            for other, fields in OF_KIND.items():
                if field in fields:
                    _change(place / other, place / "forged" / f"{other}-{field}-{kind}", of(*patterns))
            template = place / "forged" / f"template-{field}-{kind}"
            template.mkdir()
            fresh = dict.fromkeys(("layout_fingerprint", "projection_checksum", "format_version"))
            (template / file.CONFIG).write_text(json.dumps({**own, **of(*patterns), **fresh}))
            old = place / "forged" / f"old-{field}-{kind}"
            old.mkdir()
            save_file({THETA_D: file.read(place / "own").theta_d}, old / file.WEIGHTS)
            (old / file.CONFIG).write_text(json.dumps({**own, **of(*patterns), "format_version": None}))
    return place


@pytest.fixture(scope="module")
def ended(place: Path) -> dict[str, dict[str, Any]]:
    run = subprocess.run(
        [sys.executable, "-m", "tests.exchange.forged_patterns", str(place)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("pattern", PATTERNS["ends"])
def test_re_does_not_end_on_these_patterns(pattern: str) -> None:
    for match in (f"fullmatch({pattern!r}, n)", f"match({f'(.*[.])?({pattern})$'!r}, n)"):
        code = f"import re; n = 'model.layers.0.self_attn.k_proj'; re.{match}"
        with pytest.raises(subprocess.TimeoutExpired):
            subprocess.run([sys.executable, "-c", code], timeout=5, check=True)


@pytest.mark.parametrize("field", FIELDS)
def test_a_pattern_that_can_be_matched_changes_nothing(field: str, ended, place: Path) -> None:
    with torch.no_grad():
        own = get_peft_model(base_model("llama"), config("llama"))
        own.load_adapter(str(place / "own"), "own")
        own.set_adapter("own")
        logits = own.eval()(**batch("llama")).logits.flatten().tolist()
    found = ended[f"uniproj-{field}-ends"]
    assert found["from_pretrained"] == found["load_adapter"] == logits
    assert (found["verify"], found["export"]) == ("held", "written")
    assert found["bank"] == ["user"] or (field == "modules_to_save" and "must train theta_d alone" in found["bank"])
    assert ended[f"old-{field}-ends"]["from_pretrained"] == logits
    names = ended[f"template-{field}-ends"]["get_peft_model"]
    assert sorted(names) == sorted(own.base_model.targeted_module_names)
    forged, again = place / "forged" / f"uniproj-{field}-ends", place / "out" / f"uniproj-{field}-ends" / "saved"
    assert (forged / file.WEIGHTS).read_bytes() == (again / file.WEIGHTS).read_bytes()
    assert (forged / file.CONFIG).read_bytes() == (again / file.CONFIG).read_bytes()
    for other, fields in OF_KIND.items():
        if field in fields:
            assert ended[f"{other}-{field}-ends"]["import"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("field", FIELDS)
def test_a_pattern_that_takes_too_long_is_refused_by_name(field: str, ended) -> None:
    sentence = f"{field}: all patterns must be matched within 0."
    uses = {kind: ended[f"{kind}-{field}-endless"] for kind in ("uniproj", "old", "template")}
    matched = {f"{kind} {use}": end for kind, ends in uses.items() for use, end in ends.items()}
    if field != "alpha_pattern":  # which alone is part of what makes an update
        in_bank = matched.pop("uniproj bank")
        assert in_bank == ["user"] or (field == "modules_to_save" and "must train theta_d alone" in in_bank)
    assert {use: end for use, end in matched.items() if sentence not in end} == {}
    for kind, fields in OF_KIND.items():
        if field in fields:
            end = ended[f"{kind}-{field}-endless"]["import"]
            assert sentence in end if field in MATCHED[kind] else end == pytest.approx(0.0, abs=1e-9)
