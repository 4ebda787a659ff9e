"""The table of fields: every field of PEFT's LoraConfig and of ours has a place in it, and what it says holds."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from tests.format.saved import reconfigure, relabel, save
from uniproj import AdapterError
from uniproj.format import file
from uniproj.format.fields import FIELDS, FREE, REFUSED, Role, fields_of, used
from uniproj.format.header import pack, unpack
from uniproj.tuner import UniProjConfig

# a value of each refused field that PEFT takes
REFUSED_VALUES = {
    "init_lora_weights": "gaussian",
    "lora_bias": True,
    "megatron_config": {"a": 1},
    "use_dora": True,
    "use_qalora": True,
}


NAMES = [field.name for field in dataclasses.fields(UniProjConfig)]


@pytest.mark.parametrize("name", NAMES)
def test_every_field_has_a_role(name: str) -> None:
    """A field that a new PEFT brings is not in the table, and fails here until somebody says what it is."""
    assert name in FIELDS


def test_a_plain_configuration_uses_nothing_of_what_is_refused_or_trained_beside() -> None:
    for config in (LoraConfig(), UniProjConfig()):
        assert not used(vars(config), *REFUSED, Role.BESIDE)


def test_an_empty_configuration_of_a_variant_is_one(tmp_path: Path) -> None:
    """PEFT asks whether it is None: of `{}` it makes KaSA, which truncates the base weights."""
    for name in ("arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "velora_config"):
        for value in ({}, False) if name in NAMES else ():
            save(tmp_path)
            relabel(tmp_path, lambda metadata, name=name, value=value: _with_setting(metadata, name, value))
            reconfigure(tmp_path, **{name: value})
            with pytest.raises(AdapterError, match=re.escape(f"{name} {FIELDS[name].why}")):
                file.read(tmp_path)


@pytest.mark.parametrize("name", [name for name in fields_of(*REFUSED) if name in NAMES])
def test_what_is_refused_is_refused_in_code_and_in_a_file(name: str, tmp_path: Path) -> None:
    value, why = REFUSED_VALUES.get(name, {"x": 1}), re.escape(FIELDS[name].why)
    assert why
    with pytest.raises(AdapterError, match=f"^UniProjConfig: {name} {why}. Leave it at its default"):
        UniProjConfig(**{name: value})
    save(tmp_path)
    relabel(tmp_path, lambda metadata: _with_setting(metadata, name, value))
    reconfigure(tmp_path, **{name: value})
    for read in (file.read, file.of_weights):
        with pytest.raises(AdapterError, match=f"{file.CONFIG}: {name} {why}"):
            read(tmp_path)


def _with_setting(metadata: dict[str, str], name: str, value: Any) -> dict[str, str]:
    settings = json.loads(unpack(metadata["uniproj.settings"], "config_bytes"))
    return {**metadata, "uniproj.settings": pack({**settings, name: value})}


def test_only_what_is_free_may_be_said_otherwise_than_in_the_header(tmp_path: Path) -> None:
    save(tmp_path)
    fields = json.loads((tmp_path / file.CONFIG).read_text())
    others = {str: "other", int: 5, float: 0.5, bool: True, list: ["other"], dict: {"other": 1}, type(None): "other"}
    odd: dict[str, Any] = {"bias": "all", "auto_mapping": {"x": 1}, "init_lora_weights": False}
    odd |= {"layer_replication": [[0, 1]], "alora_invocation_tokens": [1]}
    for name, value in fields.items():
        save(tmp_path)
        reconfigure(tmp_path, **{name: odd.get(name, others[type(value)])})
        if name in FREE:
            file.read(tmp_path)
        else:
            with pytest.raises(AdapterError):
                file.read(tmp_path)
