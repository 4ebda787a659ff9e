"""The file of an adapter: what it holds, and everything that is refused before a model sees it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import uniproj
from tests.format.saved import (
    HEAD,
    LAYOUT,
    drop_header,
    edit_weights,
    packed_by_zlib,
    parts,
    reconfigure,
    relabel,
    rewrite,
    save,
)
from uniproj import AdapterError, LoRALayout, names
from uniproj.format import file
from uniproj.format.fields import FREE
from uniproj.format.header import Header, beyond_P, pack, quantisation, unpack
from uniproj.format.keys import IDENTITY, THETA_D
from uniproj.registry import get
from uniproj.tuner import UniProjConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("projection", [name for name in names() if not get(name).needs_base_weights])
def test_what_was_written_is_read(projection: str, tmp_path: Path) -> None:
    written = save(tmp_path, projection, base_model_name_or_path="some/base", revision="abc")
    read = file.read(tmp_path)
    assert read.header == written.header
    assert read.tensors.keys() == written.tensors.keys()
    assert all(torch.equal(read.tensors[name], written.tensors[name]) for name in written.tensors)
    assert set(read.config["target_modules"]) == {"q", "v"} and read.config["base_model_name_or_path"] == "some/base"
    assert read.header is not None
    P = read.header.build()
    assert P.layout == LAYOUT and P.d == written.theta_d.numel()


def test_the_metadata_holds_all_that_makes_P_again(folder: Path) -> None:
    metadata = parts((folder / file.WEIGHTS).read_bytes())[0]["__metadata__"]
    rows = [[module, 24, 16, 3] for module in ("layers.2.q", "layers.2.v", "layers.10.q", "layers.10.v")]
    assert metadata.pop("uniproj.layout_fingerprint") == LAYOUT.fingerprint
    assert metadata.pop("uniproj.layout") == pack(LoRALayout.from_json(json.dumps(rows, separators=(",", ":"))))
    assert json.loads(unpack(metadata.pop("uniproj.settings"), "config_bytes"))["lora_alpha"] == 3
    del metadata["format"], metadata["uniproj.sha256"]
    assert {key.removeprefix("uniproj."): json.loads(line) for key, line in metadata.items()} == {
        "format_version": 3,
        "projection": "unilora",
        "projection_version": get("unilora").version,
        "projection_kwargs": {},
        "projection_seed": 7,
        "d": 40,
        "library_version": uniproj.__version__,
        "checksum": uniproj.build("unilora", layout=LAYOUT, d=40, seed=7).checksum(),
        **dict.fromkeys(("base_model", "base_revision", "base_quantisation")),
    }


def test_equal_adapters_give_equal_files(tmp_path: Path) -> None:
    digests = set()
    for name in ("one", "two"):
        save(tmp_path / name)
        digests.add(hashlib.sha256((tmp_path / name / file.WEIGHTS).read_bytes()).hexdigest())
    assert len(digests) == 1


def test_quantisation_is_named() -> None:
    class Base:
        quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

    assert quantisation(Base()) == "bitsandbytes 4-bit nf4"
    assert quantisation(None) is None


def _large(kind: str) -> LoRALayout:
    """All linear layers of models by their published sizes; of Mixtral-8x22B the experts one by one."""
    layers, h, kv, m = {
        "llama-2-7b": (32, 4096, 4096, 11008),
        "smollm2-135m": (30, 576, 192, 1536),
        "llama-3.1-405b": (126, 16384, 1024, 53248),
        "mixtral-8x22b": (56, 6144, 1024, 16384),
    }[kind]
    inner = {f"self_attn.{n}_proj": (kv if n in "kv" else h, h) for n in "qkvo"}
    if kind == "mixtral-8x22b":
        experts = [f"block_sparse_moe.experts.{i}" for i in range(8)]
        inner |= {f"{e}.{n}": (h, m) if n == "w2" else (m, h) for e in experts for n in ("w1", "w2", "w3")}
    else:
        inner |= {"mlp.gate_proj": (m, h), "mlp.up_proj": (m, h), "mlp.down_proj": (h, m)}
    return LoRALayout.from_shapes({f"model.layers.{i}.{n}": s for i in range(layers) for n, s in inner.items()}, 4)


@pytest.mark.parametrize("kind", ["llama-2-7b", "smollm2-135m", "llama-3.1-405b", "mixtral-8x22b"])
def test_the_file_is_at_most_4_kB_larger_than_what_was_trained(kind: str, tmp_path: Path) -> None:
    layout = _large(kind)
    short = sorted({module.split(".", 4)[-1] for module in layout.modules})
    config = UniProjConfig(d=23_040, r=4, target_modules=short, base_model_name_or_path="an-organisation/a-base-model")
    # digits that do not pack, as those of a real revision and checksum
    checksum, revision = hashlib.sha256(b"P").hexdigest(), hashlib.sha1(b"base").hexdigest()
    name, settings = "an-organisation/a-base-model", beyond_P(config.to_dict())
    header = Header("unilora", 2, {}, 23_040, 0, layout, checksum, name, revision, None, settings)
    file.write(tmp_path, {THETA_D: torch.ones(23_040)}, header, config.to_dict())
    assert (tmp_path / file.WEIGHTS).stat().st_size <= 4 * 23_040 + 4096
    read = file.read(tmp_path).header
    assert read is not None and read.layout == layout


def test_what_format_1_packed_is_read() -> None:
    assert unpack(packed_by_zlib("[1]"), "config_bytes") == unpack(pack([1]), "config_bytes") == "[1]"


# ---- altered, cut off, foreign ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [file.WEIGHTS, file.CONFIG])
def test_a_file_cut_off_anywhere_is_refused(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    for length in [0, 1, 7, 8, 9, *range(10, len(whole), 97), len(whole) - 1]:
        (folder / name).write_bytes(whole[:length])
        with pytest.raises(AdapterError, match=r"again\.$"):
            file.read(folder)


@pytest.mark.parametrize("where", [-1, -25, -60])
def test_one_altered_bit_of_a_tensor_is_refused(folder: Path, where: int) -> None:
    data = bytearray((folder / file.WEIGHTS).read_bytes())
    data[where] ^= 1
    (folder / file.WEIGHTS).write_bytes(data)
    with pytest.raises(AdapterError, match=r"must have the SHA-256 .* copy or download it again"):
        file.read(folder)


def test_an_altered_header_is_refused(folder: Path) -> None:
    def other_base(header, tensors):
        header["__metadata__"]["uniproj.base_model"] = '"another"'
        return header, tensors

    edit_weights(folder, other_base)
    with pytest.raises(AdapterError, match="must have the SHA-256"):
        file.read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {**t, THETA_D: t[THETA_D][:-1].clone()}, r"shape \(40,\), got \(39,\)"),
        (lambda t: {**t, THETA_D: t[THETA_D].view(8, 5)}, r"shape \(40,\), got \(8, 5\)"),
        (lambda t: {**t, THETA_D: t[THETA_D].view(torch.int32)}, "must be of dtype float32 .* got torch.int32"),
        (lambda t: {**t, THETA_D: t[THETA_D] * float("nan")}, "must be finite"),
        (lambda t: {**t, HEAD: t[HEAD] / 0}, "head.weight: all numbers must be finite"),
        (lambda t: {**t, THETA_D: t[THETA_D] * 0}, "saddle"),
        (lambda t: {HEAD: t[HEAD]}, "got none"),
        (lambda t: {k: v for k, v in t.items() if k != IDENTITY}, f"must hold the tensor {IDENTITY}, got none"),
        (lambda t: {**t, IDENTITY: t[IDENTITY].roll(1, 0)}, "header must be that of the numbers: projection must be"),
        (lambda t: {**t, IDENTITY: t[IDENTITY][1:].clone()}, r"identity must be of shape \(7, 5\), got \(8, 5\)"),
    ],
    ids=[
        *("short", "other shape", "integers", "nan", "inf in the head", "zero", "no theta_d"),
        *("no identity", "another identity", "a shorter identity"),
    ],
)
def test_bad_tensors_are_refused(folder: Path, change, message: str) -> None:
    rewrite(folder, change)
    with pytest.raises(AdapterError, match=message):
        file.read(folder)


def test_zero_is_no_saddle_where_P_has_an_offset(tmp_path: Path) -> None:
    save(tmp_path, "sparse")
    rewrite(tmp_path, lambda t: {**t, THETA_D: t[THETA_D] * 0})
    assert not file.read(tmp_path).theta_d.any()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("projection_version", "1", "must be of version 2.* got version 1, another P. Install uniproj"),
        ("format_version", "5", "format must be at most 4, got 5 .* Install that version"),
        ("format_version", "4", "format_version must be 3, that of its Block list, got 4. The file was altered"),
        (
            "format_version",
            '"x"',
            r"format_version must be a whole number in \[0, 2\^31\), got 'x'. The file was altered",
        ),
        ("projection", '"unilroa"', "unknown projection 'unilroa'. Did you mean 'unilora'"),
        ("projection", '"../evil.py"', "names a projection, never a path"),
        ("d", "41", r"shape \(41,\), got \(40,\)"),
        ("d", "-40", r"d must be a whole number in \[1, 2\^63\), got -40"),
        ("d", "true", r"d must be a whole number in \[1, 2\^63\), got True"),
        ("layout_fingerprint", "0" * 64, "Block list must have the fingerprint 000000000000"),
        ("layout", "AAAA", "layout must be what uniproj wrote"),
        ("layout", pack([1])[:-8], "layout must be what uniproj wrote, got .*cut off"),
        ("layout", pack(" " * 2**25), "unpacks to must be at most 16,777,216"),
        ("layout", packed_by_zlib(" " * 2**25), "unpacks to must be at most 16,777,216"),
        (
            "layout",
            packed_by_zlib('[["layers.10.q",24,16,3],["layers.2.q",24,16,3]]'),
            r"natural order of their names: expected layers\.2\.q, got layers\.10\.q",
        ),
        ("layout", pack([["q", 1, 1, 1, 2]]), "format_version must be 4, that of its Block list, got 3. The file was"),
        ("settings", pack([1]), r"settings must be an object, got \[1\]"),
        ("projection_seed", "8", "projection_seed must be another, got 8"),
    ],
    ids=lambda text: text[:40],
)
def test_a_header_that_says_something_else_is_refused(folder: Path, key: str, value: str, message: str) -> None:
    relabel(folder, lambda metadata: {**metadata, f"uniproj.{key}": value})
    with pytest.raises(AdapterError, match=message):
        file.read(folder)


def test_another_P_is_refused_when_it_is_built(folder: Path) -> None:
    header = file.read(folder).header
    assert header is not None
    with pytest.raises(AdapterError, match=r"must have the checksum 0000.* another P"):
        replace(header, checksum="0" * 64).build()
    with pytest.raises(AdapterError, match="is made of the base model's weights"):
        replace(header, projection="lora_xs", projection_version=get("lora_xs").version).build()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": 8}, "lora_alpha must be 3 as in the header of .* got 8. Restore it"),
        ({"projection": "fastfood"}, "projection must be 'unilora'"),
        ({"projection": "/tmp/evil.py"}, "projection must be 'unilora'"),
        ({"d": 41}, "d must be 40"),
        ({"target_modules": ["q"]}, "target_modules must be"),
        ({"modules_to_save": None}, "modules_to_save must be"),
        ({"peft_type": "LORA"}, "peft_type must be UNIPROJ, got 'LORA'"),
        ({"inference_mode": 3}, "inference_mode must be true or false, got 3"),
        ({"base_model_name_or_path": ["x"]}, r"base_model_name_or_path must be text .* got \['x'\]"),
        ({"format_version": None}, "format_version must be 3"),
    ],
)
def test_a_configuration_that_says_otherwise_is_refused(folder: Path, changes, message: str) -> None:
    reconfigure(folder, **changes)
    with pytest.raises(AdapterError, match=message):
        file.read(folder)


def test_the_place_of_the_base_may_be_changed_by_hand(folder: Path) -> None:
    reconfigure(folder, base_model_name_or_path="/elsewhere", revision="main", inference_mode=True)
    read = file.read(folder)
    assert read.config["base_model_name_or_path"] == "/elsewhere"
    assert {"base_model_name_or_path", "revision", "inference_mode"} <= FREE


def test_a_header_that_another_tool_dropped_is_missed(folder: Path) -> None:
    drop_header(folder)
    with pytest.raises(AdapterError, match=r"must hold a header in its metadata, as adapter_config.json says"):
        file.read(folder)


def test_files_from_before_the_header_load(folder: Path) -> None:
    drop_header(folder)
    fields = json.loads((folder / file.CONFIG).read_text())
    for key in ("format_version", "remap"):
        del fields[key]
    (folder / file.CONFIG).write_text(json.dumps(fields))
    read = file.read(folder)
    assert read.header is None and read.config["projection_seed"] == 7
    reconfigure(folder, projection="../x.py")
    with pytest.raises(AdapterError, match="unknown projection"):
        file.read(folder)
