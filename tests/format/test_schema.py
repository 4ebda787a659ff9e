"""Values that no field can hold: a sentence each, from code, from a file and on the command line."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file

from tests.format.fixtures import base
from tests.format.saved import LAYOUT, packed_by_zlib, reconfigure, relabel, save
from uniproj import AdapterError, ProjectionError, build, get, names
from uniproj.cli import main
from uniproj.errors import shown
from uniproj.exchange import architecture
from uniproj.format import file
from uniproj.format.header import pack
from uniproj.format.schema import DEPTH, parse_json
from uniproj.tuner import UniProjConfig


def _nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


# {field: (what its value must be, values that it must not hold)}
WRONG: dict[str, tuple[str, list[Any]]] = {
    "r": (r"a whole number in \[1, 2\^31\)", [0, -1, 2.0, "8", True, None, [8], 2**31, 10**5000]),
    "lora_alpha": (
        r"a finite number other than 0, of a size in \[1e-30, 1e\+30\]",
        ["x", 0, 0.0, math.inf, -math.inf, math.nan, 1e300, -1e300, 1e-300, 10**400, 10**5000, True, [1]],
    ),
    "alpha_pattern": (
        "patterns of names with finite numbers",
        [[1], {"q": "x"}, {"q": math.nan}, {"q": 0}, {"q": 1e300}, "q"],
    ),
    "rank_pattern": ("patterns of names with whole", [{"q": 0}, {"q": 2.5}, {"q": "4"}, [4], 4]),
    "lora_dropout": (r"a number in \[0, 1\)", [-0.1, 1.0, math.nan, "0.1", None]),
    "use_rslora": ("true or false", ["no", 1, None]),
    "bias": ("none, all or lora_only", ["some", None, True]),
    "target_modules": ("text, a list of texts, or null", [5, [5], {"q": 1}, ["q\ud800"]]),
    "layers_to_transform": ("a whole number in", [-1, "1", [0, "1"], 1.5, True]),
    "modules_to_save": ("a list of texts, or null", ["head", 5, [5]]),
    "d": ("a whole number of at least 1, or null", [0, -1, 40.0, "40", 2**63, 10**5000]),
    "projection_seed": (r"a whole number in \[0, 2\^64\)", [-1, 2**64, 10**5000, 1.0, "1", None, True]),
    "init_seed": (r"a whole number in \[0, 2\^64\)", [-1, 2**64, 10**5000, 1.0, "1", None, True]),
    "remap": (
        r"a list of pairs \[old, new\]",
        [5, "ab", [5], ["ab"], [["a"]], [["a", "b", "c"]], [["a", 5]], {"a": "b"}, _nested(850)],
    ),
    "projection_kwargs": (
        f"JSON, an object of at most {DEPTH} levels with finite numbers",
        [{"a": _nested(850)}, {"a": math.nan}, {"a": [math.inf]}, {"a": {1}}, {"a\ud800": 1}, {1: 2}, 5],
    ),
    "projection": ("a name of 1 to 200 letters", ["x" * 5000, "uni\ud800", "", 5, None]),
    "base_model_name_or_path": ("text of at most 4096", [5, ["x"], "\ud800", "x" * 5000]),
    "trainable_token_indices": ("a list of whole numbers", [[-1], ["1"], 5, {"e": 5}, [2**31]]),
}
LINES = ("projection", "projection_kwargs", "d", "projection_seed")


def _is_a_sentence(said: str) -> bool:
    return len(said) < 1000 and said.isprintable() and said.endswith(".")


def _refused(what: str, read: Callable[..., object], *args: object, **fields: object) -> str:
    try:
        found = read(*args, **fields)
    except AdapterError as error:
        assert _is_a_sentence(str(error)), (what, error)
        return str(error)
    pytest.fail(f"{what} was taken: {found}")


@pytest.mark.parametrize("name", WRONG)
def test_in_a_configuration_made_in_code(name: str) -> None:
    must_be, values = WRONG[name]
    for value in values:
        said = _refused(shown(value), UniProjConfig, **{"d": 40, "target_modules": ["q"], name: value})
        assert re.match(f"UniProjConfig: {name} must be {must_be}.*, got ", said), said


@pytest.mark.parametrize("name", WRONG)
def test_in_a_forged_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Header, digest and configuration agree."""
    written = save(tmp_path).header
    assert written is not None
    for value in WRONG[name][1]:
        try:
            json.dumps(value)
        except (TypeError, ValueError):  # no JSON
            continue
        line, text = (
            (name, json.dumps(value)) if name in LINES else ("settings", pack({**written.settings, name: value}))
        )
        relabel(tmp_path, lambda lines, line=line, text=text: {**lines, f"uniproj.{line}": text})
        reconfigure(tmp_path, **{name: value})
        for read in (UniProjConfig.from_pretrained, file.read, file.of_weights):
            if read is not file.of_weights or name != "base_model_name_or_path":
                assert "must be" in _refused(shown(value), read, tmp_path)
        for command in ("inspect", "verify"):
            assert main([command, str(tmp_path)]) == 2, value
            assert _is_a_sentence(capsys.readouterr().err.removesuffix("\n")), value


def test_what_a_field_may_hold_is_taken() -> None:
    fine: dict[str, list[Any]] = {
        "r": [1, np.int64(4)],
        "lora_alpha": [1, 0.5, -2, 1e30, 1e-30, np.float32(0.5)],
        "alpha_pattern": [{"q": 0.5, "^v": 3}],
        "layers_to_transform": [3, [0, 3]],
        "target_modules": ["q", ["q"], {"q"}, ("q", "v"), None],
        "modules_to_save": [["head"], ("head",), None],
        "task_type": ["CAUSAL_LM", TaskType.SEQ_CLS],
        "d": [1, None],
        "projection_seed": [0, 2**64 - 1],
        "init_seed": [0, 2**64 - 1],
        "remap": [[["a", "b"], ("c", "")], None],
        "projection_kwargs": [{"a": _nested(DEPTH - 1)}, {"a": (1, 2.5, True, None, "ä")}],
        "trainable_token_indices": [[1, 2], {"embed": [3]}],
    }
    for name, values in fine.items():
        for value in values:
            config = UniProjConfig(**{name: value})
            json.dumps({key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()})


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("NaN", "the number nan"),
        ("[-Infinity]", "the number -inf"),
        ("1e999", "the number inf"),
        ('{"a": 1, "a": 2}', "a key that stands twice"),
        ("[" * 17 + "]" * 17, "more than 16 levels"),
        ("[" * 100_000, "more than 16 levels"),
        (r'"\ud800"', "surrogates not allowed"),
        (r'{"\ud800": 1}', "surrogates not allowed"),
        ("1" * 5000, "4300 digits"),
    ],
)
def test_json_beyond_what_json_can_say(text: str, got: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=got):
        parse_json(text)
    save(tmp_path)
    path = tmp_path / file.CONFIG
    path.write_text(f'{{"peft_type": "UNIPROJ", "lora_alpha": {text}}}')
    with pytest.raises(AdapterError, match=f"must be JSON, got .*{got}"):
        file.read(tmp_path)
    relabel(tmp_path, lambda lines: {**lines, "uniproj.projection_kwargs": text})
    with pytest.raises(AdapterError, match=f"projection_kwargs must be what uniproj wrote, got .*{got}"):
        file.of_weights(tmp_path)


# ---- the hyperparameters of every method ------------------------------------------------------------


def _hyperparameters() -> list[tuple[str, str, Any]]:
    found = []
    for name in names():
        hints = get_type_hints(get(name).__init__)
        for option in hints.keys() - {"layout", "d", "seed", "base_weights", "return"}:
            found.append((name, option, hints[option]))
    return sorted(found, key=str)


@pytest.mark.parametrize(("name", "option", "hint"), _hyperparameters())
def test_hyperparameters_of_another_kind_are_refused(name: str, option: str, hint: Any) -> None:
    cls = get(name)
    size = {"d": 40} if cls.free_d else {}
    weights = {module: torch.randn(24, 16) for module in LAYOUT.modules}
    needed = {"base_weights": weights} if cls.needs_base_weights else {}
    # NaN where a number is a number, and never a mapping
    for value in (math.nan, math.inf, 1e300, {"a": 1}, 10**400, b"x", torch.ones(2)):
        if isinstance(value, int) and hint is not float:
            continue
        with pytest.raises(ProjectionError, match=f"{name}: {option} must be ") as error:
            build(name, layout=LAYOUT, **size, **needed, **{option: value})
        assert _is_a_sentence(str(error.value))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_a_hyperparameter_that_is_no_number_leaves_the_model_as_it_was(value: float) -> None:
    model = base()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises((AdapterError, ProjectionError), match=r"projection_kwargs must be JSON|d_initial must be"):
        get_peft_model(model, UniProjConfig(projection="vera", r=2, projection_kwargs={"d_initial": value}))
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.parametrize("name", ["x" * 5000, "\ud800", "a\nb", "\x1b[2J", "ä" * 101])
def test_the_name_of_an_adapter_is_that_of_a_folder(name: str) -> None:
    config = UniProjConfig(d=40, r=2, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match="the name of an adapter must be one component") as error:
        get_peft_model(base(), config, adapter_name=name)
    assert _is_a_sentence(str(error.value))


def test_a_flat_layout_of_three_thousand_million_is_a_sentence(tmp_path: Path, capsys) -> None:
    save(tmp_path)
    rows = f'[["",1,{3 * 10**9},1]]'
    relabel(tmp_path, lambda lines: {**lines, "uniproj.layout": packed_by_zlib(rows)})
    assert main(["verify", str(tmp_path)]) == 2
    assert _is_a_sentence(capsys.readouterr().err.removesuffix("\n"))


# ---- a LoRA from elsewhere --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(
    ("factor", "dtype", "more"),
    [
        ("A", torch.complex64, []),
        ("B", torch.int64, []),
        ("A", torch.int8, ["--projection", "unilora", "--d", "20"]),
        ("B", torch.bool, ["--projection", "unilora", "--d", "20"]),
    ],
)
def test_factors_must_be_real_numbers(
    factor: str, dtype: torch.dtype, more: list[str], lora: Path, tmp_path, capsys
) -> None:
    folder = tmp_path / "lora"
    shutil.copytree(lora, folder)
    tensors = load_file(folder / file.WEIGHTS)
    name = next(name for name in tensors if f"lora_{factor}" in name)
    save_file({**tensors, name: torch.ones(tensors[name].shape, dtype=dtype)}, folder / file.WEIGHTS)
    assert main(["import", str(folder), str(tmp_path / "ours"), *more]) == 2
    assert f"must hold real numbers, got {dtype}" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "fields",
    [
        *({"lora_alpha": value} for value in ("x", 0, None, 1e300)),
        *({"r": value} for value in ("x", 0, None)),
        *({"alpha_pattern": value} for value in (5, {"q_proj": "x"})),
        *({"target_modules": 5}, {"layers_to_transform": "x"}, {"modules_to_save": 5}, {"use_rslora": "no"}),
    ],
)
def test_the_configuration_of_a_lora_from_elsewhere(fields: dict[str, Any], lora: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "lora"
    shutil.copytree(lora, folder)
    reconfigure(folder, **fields)
    assert main(["import", str(folder), str(tmp_path / "ours")]) == 2
    said = capsys.readouterr().err.removesuffix("\n")
    assert f"{next(iter(fields))} must be " in said and _is_a_sentence(said)


# ---- a base model from elsewhere --------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base model's folder, an adapter that needs its configuration alone, and one that needs its weights."""
    place = tmp_path_factory.mktemp("place")
    base().save_pretrained(place / "base")
    for projection, d in (("unilora", 40), ("lora_xs", None)):
        config = UniProjConfig(projection=projection, d=d, r=4, target_modules=["q_proj"])
        get_peft_model(base(), config).save_pretrained(place / projection)
    return place


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 10**12}, "hidden_size of the base model's configuration must be at most 16777216, got 1e+12"),
        ({"hidden_size": 1e12}, "must be a model that Transformers loads"),
        ({"hidden_size": -32}, "must be a model that Transformers loads"),
        ({"hidden_size": None}, "must be a model that Transformers loads"),
        ({"vocab_size": "x"}, "must be a model that Transformers loads"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers of the base model's configuration must be at most 1024"),
        ({"num_hidden_layers": 1e9}, "num_hidden_layers of the base model's configuration must be at most 1024"),
        ({"x": [{"num_experts": 10**9}]}, "num_experts of the base model's configuration must be at most 1024"),
        ({"num_labels": 10**7}, "num_labels of the base model's configuration must be at most 131072"),
        ({"num_hidden_layers": -1}, "must have modules called"),
        ({"architectures": ["os"]}, "model.layers.0.self_attn.q_proj is missing"),
        ({"architectures": ["Trainer"]}, "architectures must begin with a model class"),
        ({"architectures": ["NoSuchModel"]}, "model.layers.0.self_attn.q_proj is missing"),
        ({"architectures": []}, "model.layers.0.self_attn.q_proj is missing"),
        ({"architectures": ["GPT2Model"]}, "must be a model that Transformers loads"),
        ({"architectures": [5]}, "architectures must begin with a model class"),
        ({"architectures": 5}, "architectures must begin with a model class"),
        ({"num_attention_heads": 0}, "must be a model that Transformers loads"),
        ({"hidden_act": "os"}, "must be a model that Transformers loads"),
        ({"dtype": "system"}, "must be a model that Transformers loads"),
        ({"model_type": "no\x1b[2Jsuch"}, "no\\x1b[2Jsuch"),
        ({"model_type": None}, "must be a model that Transformers loads"),
        ("[1]", "must be a model that Transformers loads"),
        ("[" * 100_000, "must be a model that Transformers loads"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict | str) else "",
)
def test_a_hostile_base_is_a_sentence(change: Any, said: str, place: Path, tmp_path: Path, capsys) -> None:
    other = tmp_path / "base"
    shutil.copytree(place / "base", other)
    fields = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(change if isinstance(change, str) else json.dumps(fields | change))
    assert main(["verify", str(place / "unilora"), "--base", str(other)]) == 2
    found = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in found and found.isprintable()
    out = tmp_path / "out"
    assert main(["export", str(place / "lora_xs"), str(out), "--base", str(other)]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].isprintable() and not out.exists()


def test_the_weights_of_a_base_are_those_of_its_configuration(place: Path, tmp_path: Path, capsys) -> None:
    other = tmp_path / "base"
    shutil.copytree(place / "base", other)
    fields = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(fields | {"intermediate_size": 2**22}))
    assert main(["export", str(place / "lora_xs"), str(tmp_path / "out"), "--base", str(other)]) == 2
    assert "the weights must be those of its configuration, of 805,316,256 numbers" in capsys.readouterr().err


def test_a_model_of_many_modules_is_given_up(place: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(architecture, "MODULES", 20)
    assert main(["verify", str(place / "unilora"), "--base", str(place / "base")]) == 2
    assert "the base model must have at most 20 modules" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["verify", str(place / "unilora"), "--base", str(place / "base")]) == 0
