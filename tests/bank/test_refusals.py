"""What does not belong in a bank, or is no bank any more, is refused in one sentence."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from tests.bank.models import D, adapted, vector
from tests.tuner.models import base_model, config
from uniproj import AdapterError
from uniproj.bank import AdapterBank, mixed
from uniproj.tuner import adapter_of


def test_an_adapter_of_another_p_is_refused_with_the_first_difference(bank: AdapterBank) -> None:
    same_P = r"must have the bank's P: "
    others = {
        same_P + 'projection must be "unilora", got "fastfood"': {"projection": "fastfood"},
        same_P + "projection_seed must be 0, got 1": {"projection_seed": 1},
        same_P + "d must be 60, got 50": {"d": 50},
        same_P + "projection_kwargs must be": {"projection_kwargs": {"assignment": "iid"}, "d": 8},
        same_P + "lora_alpha must be 4, got 8": {"lora_alpha": 8},
        same_P + "use_rslora must be false, got true": {"use_rslora": True},
        same_P
        + r"\S*layers\.0\.mlp\.down_proj must have \(out, in, rank\) = \(32, 48, 4\), got no adapter\. Keep one": {
            "target_modules": ["q_proj", "v_proj"]
        },
        same_P
        + r"\S*layers\.0\.mlp\.gate_proj must have no adapter, got \(out, in, rank\) = \(48, 32, 4\)\. Keep one": {
            "target_modules": ["q_proj", "v_proj", "down_proj", "gate_proj"]
        },
        same_P + r"\S*down_proj must have \(out, in, rank\) = \(32, 48, 4\), got .*\(32, 48, 2\)\. Keep one": {
            "r": 2,
            "lora_alpha": 4,
        },
    }
    for message, fields in others.items():
        other = adapted(**fields)
        for use in (lambda o=other: bank.add("x", o), lambda o=other: bank.select(o, "y")):
            with pytest.raises(AdapterError, match=message):
                use()
    assert bank.names() == []


def test_adapters_with_numbers_of_their_own_are_refused(bank: AdapterBank, tmp_path) -> None:
    learned = get_peft_model(base_model("llama"), config("llama", "vblora", None))
    with pytest.raises(AdapterError, match="vblora must have no numbers of its own, got the learned logits"):
        AdapterBank.create(tmp_path / "x", learned)
    head = get_peft_model(base_model("bert"), config("bert"))
    with pytest.raises(AdapterError, match="must train theta_d alone, got modules_to_save"):
        AdapterBank.create(tmp_path / "x", head)
    assert not (tmp_path / "x").exists()


def test_bad_input_is_one_sentence(bank: AdapterBank, model: PeftModel, tmp_path) -> None:
    bank.add("a", vector(0))
    refused = {
        r"'a' must be a new name": lambda: bank.add("a", vector(1)),
        r"must hold the name 'b', got none": lambda: bank.replace("b", vector(1)),
        r"must hold the name 'c', got none": lambda: bank.delete("c"),
        r"must hold the name 'd', got none": lambda: bank.get("d"),
        r"must hold the name 'e', got none": lambda: bank.select(model, "e"),
        r"shape \(d,\) = \(60,\), got torch.float32 of shape \(59,\)": lambda: bank.add("b", vector(0)[1:]),
        r"got torch.int64 of shape \(60,\)": lambda: bank.add("b", torch.ones(60, dtype=torch.int64)),
        r"theta_d of 'b' must be finite": lambda: bank.add("b", vector(0) / 0),
        r"theta_d of 'c' must be finite in float32": lambda: bank.add("c", vector(0).double() * 1e39),
        r"at least one letter and at most 65,536 bytes, got ''": lambda: bank.add("", vector(0)),
        r"at least one letter .*, got 3\.": lambda: bank.add(3, vector(0)),  # type: ignore[arg-type]
        r"at least one name is needed": lambda: bank.batch([]),
        r"must not exist yet": lambda: AdapterBank.create(bank.folder, model),
        r"\S must not exist yet, got one": lambda: AdapterBank.create(".", model),
        r"/\S* must not exist yet, got one": lambda: AdapterBank.create("", model),
        r"folder must be a path, got a int": lambda: AdapterBank(5),  # type: ignore[arg-type]
        r"source of P must be a model or the folder of a saved adapter, got a int": (
            lambda: AdapterBank.create(tmp_path / "x", 5)  # type: ignore[arg-type]
        ),
        r"'b' must be a tensor \(d,\), a model or .*got a ndarray.*torch.as_tensor": (
            lambda: bank.add("b", vector(0).numpy())  # type: ignore[arg-type]
        ),
        r"got a list\. .*torch.as_tensor": lambda: bank.replace("a", [1.0] * D),  # type: ignore[arg-type]
        r"got a NoneType": lambda: bank.add("b", None),  # type: ignore[arg-type]
        r"must be a folder that can be read": lambda: AdapterBank(tmp_path / "none"),
        r"must hold a uniproj adapter, got a Linear": lambda: bank.select(nn.Linear(2, 2), "a"),
    }
    for message, use in refused.items():
        with pytest.raises(AdapterError, match=message):
            use()
    assert bank.names() == ["a"] and torch.equal(bank.get("a"), vector(0))


VECTORS, INDEX = "theta_d.safetensors", "index.sqlite"
# what is done to which file: its new content, None for a file that is gone
DAMAGES = {
    "gone": (VECTORS, lambda content: None),
    "cut": (VECTORS, lambda content: content[: -4 * D - 1]),
    "emptied": (VECTORS, lambda content: b""),
    "another file": (VECTORS, lambda content: b"\xff" * 5000),
    "header": (VECTORS, lambda content: content.replace(b'"F32"', b'"F16"')),
    "no index": (INDEX, lambda content: None),
    "empty index": (INDEX, lambda content: b""),
    "no database": (INDEX, lambda content: b"nothing" * 1000),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_bank_is_an_error_and_not_an_adapter(damage: str, bank: AdapterBank) -> None:
    bank.add_many({f"{i}": vector(i) for i in range(5)})
    bank.close()
    name, change = DAMAGES[damage]
    file = bank.folder / name
    content = change(file.read_bytes())
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(AdapterError, match=r"whole folder back from a backup \(AdapterBank.backup\)") as refused:
        AdapterBank(bank.folder).get("3")
    assert "lost" not in str(refused.value)
    assert file.exists() == (content is not None)  # opening makes no new one


def test_a_vector_with_another_bit_is_an_error_until_it_is_replaced(bank: AdapterBank) -> None:
    bank.add_many({f"{i}": vector(i) for i in range(5)})
    bank.close()
    content = bytearray((bank.folder / VECTORS).read_bytes())
    content[content.index(vector(3).numpy().tobytes()) + 17] ^= 4
    (bank.folder / VECTORS).write_bytes(content)
    again = AdapterBank(bank.folder)
    assert torch.equal(again.get("2"), vector(2))
    with pytest.raises(AdapterError, match="numbers of '3' must be those that were written"):
        again.get("3")
    again.replace("3", vector(3))
    assert torch.equal(again.get("3"), vector(3))


def test_a_merged_adapter_is_not_selected_into_and_a_disabled_one_is(bank: AdapterBank) -> None:
    model = adapted()
    bank.add_many({"a": vector(1), "b": vector(2)})
    weight = model.base_model.model.model.layers[1].self_attn.q_proj.base_layer.weight
    before = weight.clone()
    bank.select(model, "a")
    model.merge_adapter()
    with pytest.raises(AdapterError, match=r"bank.select: the adapter must not be merged.*Call unmerge_adapter"):
        bank.select(model, "b")
    model.unmerge_adapter()
    torch.testing.assert_close(weight, before)
    with model.disable_adapter():
        bank.select(model, "b")
    assert torch.equal(adapter_of(model).theta_d, vector(2))


@pytest.mark.parametrize("name", ["\udcff", "", 3, None, ["a"], b"a"])
def test_what_is_no_text_is_no_name(name, bank: AdapterBank, model: PeftModel) -> None:
    bank.add("a", vector(0))
    uses = (
        lambda: bank.add(name, vector(1)),
        lambda: bank.replace(name, vector(1)),
        lambda: bank.get(name),
        lambda: bank.batch([name]),
        lambda: bank.select(model, name),
        lambda: bank.delete(name),
    )
    for use in uses:
        with pytest.raises(AdapterError, match="a name must be valid text of at least one letter"):
            use()
    assert name not in bank and bank.names() == ["a"]


@pytest.mark.parametrize("around", [torch.compile, nn.DataParallel])
def test_a_model_around_the_adapter_is_told_from_one_without(around, bank: AdapterBank, model: PeftModel) -> None:
    bank.add("a", vector(0))
    outer = around(model)
    uses = (
        lambda: bank.select(outer, "a"),
        lambda: bank.add("b", outer),
        lambda: mixed(outer, vector(0)[None], [0]).__enter__(),
    )
    for use in uses:
        with pytest.raises(AdapterError, match=rf"PeftModel itself, got a {type(outer).__name__} around it"):
            use()


def test_an_error_of_the_callers_own_disk_goes_through(bank: AdapterBank) -> None:
    def pairs():
        yield "a", vector(0)
        raise FileNotFoundError("the caller's file")

    with pytest.raises(FileNotFoundError, match="the caller's file"):
        bank.add_many(pairs())
    assert bank.names() == []


def test_zeros_are_kept_but_not_exported_where_no_loading_takes_them(bank: AdapterBank, tmp_path) -> None:
    bank.add("base model", torch.zeros(D))
    with pytest.raises(AdapterError, match=r"bank.export of 'base model': .*theta_d = 0 is a saddle"):
        bank.export("base model", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not bank.get("base model").any()
