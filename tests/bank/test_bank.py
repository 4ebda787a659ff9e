"""The bank: what goes in comes out, one entry at a time and in one file."""

import os
import threading
import tracemalloc
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn

from tests.bank.models import D, adapted, vector
from tests.forked import in_child
from tests.tuner.models import base_model, batch
from uniproj import AdapterError, Projection
from uniproj.bank import AdapterBank
from uniproj.tuner import adapter_of, tuner_of
from uniproj.tuner.theta import FactorSource


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
    # no path and no SQL is made of a name
    strange = "näme/../x'); DROP TABLE adapters; --"
    bank.add(strange, vector(7))
    expected[strange] = vector(7)
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
    model = adapted()
    bank.add_many({"a": vector(1), "b": vector(2)})
    projection, theta_d = adapter_of(model)
    expected = {}
    for name in ("a", "b"):
        with torch.no_grad():
            theta_d.copy_(bank.get(name))
            expected[name] = model(**batch("llama")).logits
    calls = []
    original = type(projection)._matvec
    monkeypatch.setattr(type(projection), "_of_one", Projection._of_one)
    monkeypatch.setattr(type(projection), "_matvec", lambda self, x, dtype: calls.append(1) or original(self, x, dtype))
    for count, name in enumerate(("a", "b", "a"), 1):
        bank.select(model, name)
        with torch.no_grad():
            assert torch.equal(model(**batch("llama")).logits, expected[name])
        assert len(calls) == count
    assert adapter_of(model).theta_d is theta_d and theta_d.requires_grad


def test_select_projects_only_what_a_later_call_takes(monkeypatch, bank: AdapterBank) -> None:
    """Off the CPU, here on the meta device, a call outside of `generate` projects anew whatever was there."""
    calls: list[int] = []
    model = adapted()
    monkeypatch.setattr(FactorSource, "views", lambda self: calls.append(1))
    bank.add("3", vector(3))
    for device, in_generate, expected in (("cpu", False, 1), ("meta", False, 0), ("meta", True, 1)):
        model.to(device)
        call = tuner_of(model)._call
        with call.generation() if in_generate else nullcontext():
            bank.select(model, "3")
        assert len(calls) == expected, (device, in_generate)
        calls.clear()


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
    model, compiled_graphs = adapted(), []

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
    trained = adapted(init_seed=3)
    trained.save_pretrained(tmp_path / "saved")
    bank.add("from a model", trained)
    theta_d = adapter_of(trained).theta_d
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
    other, bank.header = adapted(), replace(bank.header, base_model="org/trained-on-this")
    other.base_model.model.name_or_path = "org/another"
    with pytest.warns(UserWarning, match=r"trained on base model org/trained-on-this \(now org/another\)"):
        bank.select(other, "a")


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

    def child() -> None:
        bank.replace("0", vector(500))
        assert torch.equal(bank.get("1"), vector(91))

    in_child(child)
    assert torch.equal(bank.get("0"), vector(500))


def test_a_relative_folder_is_that_of_the_opening(bank: AdapterBank, tmp_path, monkeypatch) -> None:
    bank.add("a", vector(1))
    monkeypatch.chdir(tmp_path)
    opened = AdapterBank("bank")
    monkeypatch.chdir("/")
    opened.add("b", vector(2))
    opened.close()
    assert opened.names() == ["a", "b"] and torch.equal(AdapterBank(opened.folder).get("b"), vector(2))
