"""What came from a file reaches a terminal in visible characters alone, and never makes a line of its own."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import pytest
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from experiments import train
from experiments.errors import ExperimentError
from tests.format.fixtures import base
from tests.format.saved import LAYOUT, reconfigure, relabel, save
from uniproj import AdapterError, LoRALayout, ProjectionError, build, console
from uniproj.cli import main
from uniproj.errors import printable, shown
from uniproj.format import file
from uniproj.format.header import Header
from uniproj.format.keys import THETA_D
from uniproj.tuner import UniProjConfig

FORGED = "x\nchecksum             abc\r\x1b[2J\x9b31m\x7f\u202e\u2066\u200b\u2028\u2029\u0085end"
ESCAPED = r"x\nchecksum             abc\r\x1b[2J\x9b31m\x7f\u202e\u2066\u200b\u2028\u2029\x85end"


def _lines(text: str) -> list[str]:
    assert all(line.isprintable() for line in text.split("\n")), text
    return text.split("\n")


def test_characters_that_cannot_be_seen_are_escaped() -> None:
    for character in (
        *map(chr, [*range(32), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]),
        *"\u200b\u200c\u200d\u200e\u200f\u2028\u2029\u2060\ufeff\u061c\ud800\udfff\U000e0001",
    ):
        escape = repr(character)[1:-1]
        assert printable(f"a{character}b") == f"a{escape}b"
        for kind in (AdapterError, ProjectionError, ExperimentError):
            error = kind(f"a{character}b: must be ü, got \\n.")
            assert str(error).isprintable() and str(pickle.loads(pickle.dumps(error))) == str(error), escape
            assert escape in str(error) and isinstance(error, ValueError)


def test_letters_of_all_languages_stay() -> None:
    for text in ("naïve, 模型, модель, नमूना \\ '\"", "e\u0301"):
        assert printable(text) == text


def test_a_long_value_is_quoted_short() -> None:
    assert len(shown("x" * 10**6)) < 100 and len(shown([["x" * 999] * 999] * 999)) < 200
    assert shown("abc") == "'abc'" and shown(10**5000) == "a number of too many digits"


@pytest.fixture
def forged(tmp_path: Path) -> Path:
    """An adapter with a base model and modules of such names; digest and fingerprint are those of its content."""
    layout = LoRALayout.from_shapes({f"{FORGED}.{b.module}": (24, 16) for b, _ in LAYOUT.pairs()}, r=3)
    config = UniProjConfig(d=40, r=3, target_modules=[*layout.modules], base_model_name_or_path=FORGED, revision="a\nb")
    P = build("unilora", layout=layout, d=40)
    file.write(tmp_path, {THETA_D: P.init_theta(1)}, Header.of(config.to_dict(), P), config.to_dict())
    return tmp_path


@pytest.mark.parametrize("has_header", [True, False])
def test_inspect_has_one_line_for_each_fact(has_header: bool, forged: Path, capsys) -> None:
    if not has_header:
        path = forged / file.WEIGHTS
        save_file({THETA_D: load_file(path)[THETA_D]}, path)
        reconfigure(forged, format_version=None)
    assert main(["inspect", str(forged)]) == 0
    said = _lines(capsys.readouterr().out)
    assert len([line for line in said if line.startswith("checksum")]) == 1
    assert f"base_model           {ESCAPED}" in said
    assert len({line[:20] for line in said if line}) == len([line for line in said if line])
    assert main(["inspect", str(forged), "--json"]) == 0
    out = capsys.readouterr().out
    _lines(out)
    assert json.loads(out)["base_model"] == FORGED


def test_verify_export_and_restore(forged: Path, tmp_path_factory, capsys) -> None:
    out = tmp_path_factory.mktemp("out")
    for command in (["verify"], ["export", "--to", "lora"], ["export", "--to", "vera"], ["restore"]):
        arguments = [command[0], str(forged), *([str(out / "lora")] if command[0] == "export" else []), *command[1:]]
        main(arguments)
        captured = capsys.readouterr()
        _lines(captured.out)
        _lines(captured.err)


def test_a_base_model_of_another_name_is_one_line_of_warning(tmp_path: Path, capsys) -> None:
    base().save_pretrained(tmp_path / "base")
    get_peft_model(base(), UniProjConfig(d=40, r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "ours")
    forge = {"uniproj.base_model": json.dumps(FORGED), "uniproj.base_revision": json.dumps("a\nwarning: b")}
    relabel(tmp_path / "ours", lambda lines: {**lines, **forge})
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "ours"), "--base", str(tmp_path / "base")]) == 0
    said = _lines(capsys.readouterr().out)
    assert [line for line in said if line.startswith("warning: ")] == [said[-2]] and ESCAPED in said[-2]
    with pytest.warns(UserWarning, match="the adapter was trained on") as warned:
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "ours"))
    assert all(str(w.message).isprintable() for w in warned if "trained on" in str(w.message))


@pytest.mark.parametrize("line", ["projection", "library_version", "base_model", "checksum"])
def test_a_refusal_is_one_line(line: str, tmp_path: Path, capsys) -> None:
    save(tmp_path)
    relabel(tmp_path, lambda lines: {**lines, f"uniproj.{line}": json.dumps(FORGED), "uniproj.format_version": "5"})
    assert main(["inspect", str(tmp_path)]) == 2
    relabel(tmp_path, lambda lines: {**lines, "uniproj.format_version": "3"})
    main(["verify", str(tmp_path)])
    assert len(_lines(capsys.readouterr().err.removesuffix("\n"))) <= 2


def test_a_terminal_that_knows_few_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, base_model_name_or_path="模型 é \u202e")
    for encoding, wanted in (
        ("ascii", r"\u6a21\u578b \xe9"),
        ("latin-1", r"\u6a21\u578b é"),
        ("utf-8", "模型 é"),
    ):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr("sys.stdout", stdout)
        assert main(["inspect", str(tmp_path)]) == 0
        said = stdout.buffer.getvalue().decode(encoding)
        assert rf"base_model           {wanted} \u202e" in said.splitlines(), encoding


def test_a_lone_surrogate_is_no_traceback(tmp_path: Path, capsys) -> None:
    save(tmp_path)
    relabel(tmp_path, lambda lines: {**lines, "uniproj.base_model": json.dumps("\ud800")})
    assert main(["inspect", str(tmp_path)]) == 2
    assert len(_lines(capsys.readouterr().err)) == 2
    assert main(["inspect", str(tmp_path / "\udcff\n")]) == 2
    assert len(_lines(capsys.readouterr().err)) == 2


@pytest.mark.parametrize("ours", ["import", "check"])
def test_names_on_the_command_line(ours: str, tmp_path: Path, capsys) -> None:
    arguments = {"import": ["import", f"{tmp_path}/{FORGED}", str(tmp_path / "out")], "check": ["check", FORGED]}[ours]
    assert main(arguments) == 2
    assert len(_lines(capsys.readouterr().err)) == 2


def test_every_command_prints_visible_characters_alone(capsys) -> None:
    @console.command
    def show() -> int:
        print("a\x1b[2J\x9b\u202e\ud800b\nc", end="")
        return 0

    assert show() == 0
    assert capsys.readouterr().out == "a\\x1b[2J\\x9b\\u202e\\ud800b\nc"
    print("\x1b", end="")
    assert capsys.readouterr().out == "\x1b"


def test_progress_and_results_of_runs(tmp_path: Path, capsys) -> None:
    with console.Progress("run", 1, 0) as progress:
        progress.ended("a\nb\x1b[2J", "failed: c\nd")
    assert _lines(capsys.readouterr().err)[-2].endswith(r"a\nb\x1b[2J failed: c\nd")
    (tmp_path / "config.json").write_text("{}")
    result = {"metric": "accuracy\nrun done: accuracy", "score": 1, "config": {"score_on": "test\x1b[2J"}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    train.main([str(tmp_path)])
    captured = capsys.readouterr()
    assert len(_lines(captured.out)) <= 2
