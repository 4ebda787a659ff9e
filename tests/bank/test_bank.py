"""The bank: what goes in comes out, one entry at a time and in one file; what does not belong is refused."""

import os
import sqlite3
import threading
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn

from tests.tuner.models import base_model, batch, config
from uniproj import AdapterError
from uniproj.bank import AdapterBank

D = 60


def _model(**fields) -> PeftModel:
    return get_peft_model(base_model("llama"), config("llama", d=fields.pop("d", D), **fields)).eval()


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return _model()


@pytest.fixture
def bank(model: PeftModel, tmp_path) -> AdapterBank:
    return AdapterBank.create(tmp_path / "bank", model)


def vector(seed: int) -> torch.Tensor:
    return torch.randn(D, generator=torch.Generator().manual_seed(seed))


def test_what_goes_in_comes_out(bank: AdapterBank) -> None:
    expected = {f"user {i}": vector(i) for i in range(40)}
    bank.add("user 0", expected["user 0"])
    bank.add_many({name: v for name, v in expected.items() if name != "user 0"})
    for i in (3, 7, 3):
        expected[f"user {i}"] = vector(100 + i)
        bank.replace(f"user {i}", expected[f"user {i}"])
    for i in (0, 20):
        del expected[f"user {i}"]
        bank.delete(f"user {i}")
    bank.add("näme/../with 'marks'; --", vector(7))
    expected["näme/../with 'marks'; --"] = vector(7)
    for seen in (bank, AdapterBank(bank.folder)):
        assert seen.names() == list(seen) == sorted(expected) and len(seen) == len(expected)
        assert all(torch.equal(seen.get(name), v) for name, v in expected.items())
        assert "user 1" in seen and "user 0" not in seen
    assert sorted(os.listdir(bank.folder.parent)) == ["bank"]


def test_the_vectors_are_one_safetensors_file_that_anything_reads(bank: AdapterBank) -> None:
    bank.add_many((f"{i}", vector(i)) for i in range(10))
    with safe_open(bank.folder / "theta_d.safetensors", "pt") as file:
        rows, metadata = file.get_tensor("theta_d"), file.metadata()
    assert rows.shape == (10, D) and rows.dtype == torch.float32
    for i in range(10):
        assert any(torch.equal(vector(i), row) for row in rows)
    assert metadata["uniproj.projection"] == '"unilora"' and metadata["uniproj.d"] == str(D)


def test_the_file_grows_by_a_thirtysecond_and_slots_are_used_again(bank: AdapterBank) -> None:
    def slots() -> int:
        with safe_open(bank.folder / "theta_d.safetensors", "np") as file:
            return file.get_slice("theta_d").get_shape()[0]

    bank.add_many({f"{i}": vector(i) for i in range(320)})
    assert slots() == 320
    bank.replace("5", vector(5))  # never in place: one slot more is needed
    assert slots() == 330
    for i in range(100):
        bank.replace(f"{i}", vector(i))
    bank.delete("300")
    bank.add_many({f"new {i}": vector(i) for i in range(11)})
    assert slots() == 330
    assert all(torch.equal(bank.get(f"{i}"), vector(i)) for i in range(300))


def test_dtypes_and_devices_are_brought_to_float32(bank: AdapterBank) -> None:
    bank.add("half", vector(0).bfloat16())
    bank.add("double", nn.Parameter(vector(1).double()))
    bank.add("strided", torch.stack([vector(2), vector(3)], 1)[:, 0])
    assert torch.equal(bank.get("half"), vector(0).bfloat16().float())
    assert torch.equal(bank.get("double"), vector(1)) and torch.equal(bank.get("strided"), vector(2))


def test_select_is_one_copy_and_one_projection(monkeypatch, bank: AdapterBank) -> None:
    model = _model()
    bank.add_many({"a": vector(1), "b": vector(2)})
    projection, theta_d = model.base_model.projections["default"], model.base_model.uniproj_theta_d["default"]
    expected = {}
    for name in ("a", "b"):
        with torch.no_grad():
            theta_d.copy_(bank.get(name))
            expected[name] = model(**batch("llama")).logits
    calls = []
    original = type(projection)._matvec
    monkeypatch.setattr(type(projection), "_matvec", lambda self, x, dtype: calls.append(1) or original(self, x, dtype))
    for count, name in enumerate(("a", "b", "a"), 1):
        bank.select(model, name)
        with torch.no_grad():
            assert torch.equal(model(**batch("llama")).logits, expected[name])
        assert len(calls) == count
    assert model.base_model.uniproj_theta_d["default"] is theta_d and theta_d.requires_grad


def test_a_larger_bank_takes_no_more_to_select_from(model: PeftModel, bank: AdapterBank) -> None:
    def most_allocated() -> int:
        opened = AdapterBank(bank.folder)
        opened.select(model, "3")
        tracemalloc.start()
        try:
            opened.select(model, "7")
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    bank.add_many((f"{i}", vector(i)) for i in range(10))
    few = most_allocated()
    bank.add_many((f"{i}", vector(i)) for i in range(10, 4000))
    assert most_allocated() < few + 4 * D  # less than one vector more, of 3,990


def test_select_compiles_nothing_again(bank: AdapterBank) -> None:
    bank.add_many({f"{i}": vector(i) for i in range(6)})
    model, compiled_graphs = _model(), []

    def backend(graph, _):
        compiled_graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for name in ("0", "1"):  # the first call without, the second with a theta_D in place
            bank.select(model, name)
            compiled(**batch("llama"))
        settled = len(compiled_graphs)
        for name in ("2", "3", "4", "5", "2"):
            bank.select(model, name)
            found = compiled(**batch("llama")).logits
    assert settled and len(compiled_graphs) == settled
    with torch.no_grad():
        torch.testing.assert_close(found, model(**batch("llama")).logits, rtol=1e-5, atol=1e-5)


def test_models_and_saved_adapters_go_in_and_exports_come_out(model: PeftModel, bank: AdapterBank, tmp_path) -> None:
    trained = _model(init_seed=3)
    trained.save_pretrained(tmp_path / "saved")
    bank.add("from a model", trained)
    theta_d = trained.base_model.uniproj_theta_d["default"]
    assert torch.equal(bank.get("from a model"), theta_d)
    bank.add("other", vector(9))
    bank.export("from a model", tmp_path / "out")
    with torch.no_grad():
        expected = trained(**batch("llama")).logits
        loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path / "out").eval()
        assert torch.equal(loaded(**batch("llama")).logits, expected)
    bank.add("from a folder", tmp_path / "out")
    assert torch.equal(bank.get("from a folder"), theta_d)
    again = AdapterBank.create(tmp_path / "second", str(tmp_path / "out"))
    again.add("x", loaded)
    assert torch.equal(again.get("x"), theta_d)


def test_another_base_of_the_same_architecture_is_a_warning(bank: AdapterBank) -> None:
    bank.add("a", vector(1))
    other, bank.header = _model(), replace(bank.header, base_model="org/trained-on-this")
    other.base_model.model.name_or_path = "org/another"
    with pytest.warns(UserWarning, match=r"trained on base model org/trained-on-this \(now org/another\)"):
        bank.select(other, "a")


def test_an_adapter_of_another_p_is_refused_with_the_first_difference(bank: AdapterBank) -> None:
    same_P = r"must have the bank's P: "
    others = {
        same_P + 'projection must be "unilora", got "fastfood"': {"projection": "fastfood"},
        same_P + "projection_seed must be 0, got 1": {"projection_seed": 1},
        same_P + "d must be 60, got 50": {"d": 50},
        same_P + "projection_kwargs must be": {"projection_kwargs": {"assignment": "iid"}, "d": 8},
        same_P + "lora_alpha must be 4, got 8": {"lora_alpha": 8},
        same_P + "use_rslora must be false, got true": {"use_rslora": True},
        r"with other modules, shapes or ranks: .*layers\.0\.mlp\.down_proj": {"target_modules": ["q_proj", "v_proj"]},
        r"layers\.0\.mlp\.down_proj must have \(rank\) = \(4\), got \(2\)": {"r": 2, "lora_alpha": 4},
    }
    for message, fields in others.items():
        other = _model(**fields)
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
        r"at least one letter, got ''": lambda: bank.add("", vector(0)),
        r"at least one letter, got 3": lambda: bank.add(3, vector(0)),  # type: ignore[arg-type]
        r"at least one name is needed": lambda: bank.batch([]),
        r"must not exist yet": lambda: AdapterBank.create(bank.folder, model),
        r"must be a folder that can be read": lambda: AdapterBank(tmp_path / "none"),
        r"must hold a uniproj adapter, got a Linear": lambda: bank.select(nn.Linear(2, 2), "a"),
    }
    for message, use in refused.items():
        with pytest.raises(AdapterError, match=message):
            use()
    assert bank.names() == ["a"] and torch.equal(bank.get("a"), vector(0))


def test_of_many_all_are_added_or_none(bank: AdapterBank) -> None:
    bank.add("5", vector(0))
    for pairs in ([("1", vector(1)), ("1", vector(2))], ((f"{i}", vector(i)) for i in range(600))):
        with pytest.raises(AdapterError, match="must be a new name"):
            bank.add_many(pairs)
        assert bank.names() == ["5"] and torch.equal(bank.get("5"), vector(0))
    bank.add_many((f"user {i}", vector(i)) for i in range(600))
    assert len(bank) == 601 and torch.equal(bank.get("user 599"), vector(599))


def test_a_batch_reads_each_vector_once(bank: AdapterBank) -> None:
    bank.add_many({"a": vector(1), "b": vector(2)})
    thetas, rows = bank.batch(["b", "a", "b", "b"])
    assert torch.equal(thetas, torch.stack([vector(2), vector(1)])) and rows.tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("damage", ["cut", "emptied", "another file", "header", "no index", "no database", "bits"])
def test_a_damaged_bank_is_an_error_and_not_an_adapter(damage: str, bank: AdapterBank) -> None:
    bank.add_many({f"{i}": vector(i) for i in range(5)})
    bank.close()
    vectors, index = bank.folder / "theta_d.safetensors", bank.folder / "index.sqlite"
    content = vectors.read_bytes()
    if damage == "cut":
        vectors.write_bytes(content[: -4 * D - 1])
    elif damage == "emptied":
        vectors.write_bytes(b"")
    elif damage == "another file":
        vectors.write_bytes(b"\xff" * 5000)
    elif damage == "header":
        vectors.write_bytes(content.replace(b'"F32"', b'"F16"'))
    elif damage == "no index":
        index.unlink()
    elif damage == "no database":
        index.write_bytes(b"nothing" * 1000)
    else:
        flipped = np.frombuffer(vector(3).numpy().tobytes(), np.uint8)
        place = content.index(flipped.tobytes()) + 17
        vectors.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
    if damage == "bits":
        again = AdapterBank(bank.folder)
        assert torch.equal(again.get("2"), vector(2))
        with pytest.raises(AdapterError, match="numbers of '3' must be those that were written"):
            again.get("3")
        again.replace("3", vector(3))
        assert torch.equal(again.get("3"), vector(3))
    else:
        with pytest.raises(AdapterError, match=r"[Bb]ring|check"):
            AdapterBank(bank.folder).get("3")
    assert not index.exists() or damage != "no index"  # opening makes no new one


def test_threads_and_forked_processes_use_one_bank(bank: AdapterBank) -> None:
    bank.add_many({f"{i}": vector(i) for i in range(4)})
    wrong: list[str] = []

    def work(i: int) -> None:
        for turn in range(10):
            bank.replace(f"{i}", vector(10 * turn + i))
            if not torch.equal(bank.get(f"{i}"), vector(10 * turn + i)):
                wrong.append(f"{i} in turn {turn}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    child = os.fork()
    if child == 0:
        bank.replace("0", vector(500))
        os._exit(0 if torch.equal(bank.get("1"), vector(91)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(bank.get("0"), vector(500))


def test_no_sql_is_made_of_names(bank: AdapterBank) -> None:
    bank.add("x'); DROP TABLE adapters; --", vector(0))
    with sqlite3.connect(bank.folder / "index.sqlite") as connection:
        assert connection.execute("SELECT name FROM adapters").fetchall() == [("x'); DROP TABLE adapters; --",)]
