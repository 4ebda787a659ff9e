"""A process that dies, or a disk that is full, at any step of a write: the bank is as before or as after it."""

import os
import resource

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from torch import nn

from tests.forked import die, dies_in_child, in_child
from uniproj import AdapterError
from uniproj.bank import AdapterBank, slots
from uniproj.bank.index import Change
from uniproj.bank.slots import Slots
from uniproj.tuner import UniProjConfig

D = 3000  # several pages, so that a vector can be torn


def vector(seed: int) -> torch.Tensor:
    return torch.full((D,), float(seed))


@pytest.fixture
def bank(tmp_path) -> AdapterBank:
    model = get_peft_model(nn.Sequential(nn.Linear(D, 4)), UniProjConfig(d=D, r=4, target_modules=["0"]))
    bank = AdapterBank.create(tmp_path / "bank", model)
    bank.add_many({"a": vector(1), "b": vector(2)})
    return bank


INTERRUPTIONS = {
    "before the file has grown": (os, "ftruncate"),
    "between growth and header": (slots, "_to_disk"),
    "before new slots are entered": (Change, "add_free"),
    "before a slot is written": (Slots, "write"),
    "before the old name goes": (Change, "remove"),
    "between the old name and the new": (Change, "put"),
}


@pytest.mark.parametrize("step", INTERRUPTIONS)
@pytest.mark.parametrize("write", ["add", "replace"])
def test_killed_at_any_step(step: str, write: str, bank: AdapterBank, monkeypatch) -> None:
    where, what = INTERRUPTIONS[step]
    with monkeypatch.context() as patch:
        patch.setattr(where, what, die)
        dies_in_child(lambda: getattr(bank, write)("new" if write == "add" else "a", vector(9)))
    for seen in (bank, AdapterBank(bank.folder)):
        assert seen.names() == ["a", "b"]
        assert torch.equal(seen.get("a"), vector(1)) and torch.equal(seen.get("b"), vector(2))
    bank.add("next", vector(5))  # nobody's lock is left, and what grew is used
    assert torch.equal(bank.get("next"), vector(5))
    with safe_open(bank.folder / "theta_d.safetensors", "pt") as file:
        assert file.get_tensor("theta_d").shape == (3, D)


def test_killed_within_a_vector(bank: AdapterBank, monkeypatch) -> None:
    def half(self: Slots, rows) -> None:
        for slot, row in rows:
            with self.path.open("r+b") as file:
                file.seek(self._end(slot))
                file.write(row.tobytes()[: 2 * D])
            die()

    with monkeypatch.context() as patch:
        patch.setattr(Slots, "write", half)
        dies_in_child(lambda: bank.replace("a", vector(9)))
    assert torch.equal(bank.get("a"), vector(1))
    bank.replace("a", vector(7))
    assert torch.equal(bank.get("a"), vector(7)) and torch.equal(bank.get("b"), vector(2))


@pytest.mark.parametrize("refused", ["ftruncate", "fdatasync"])
def test_a_full_disk_is_one_sentence(refused: str, bank: AdapterBank, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, refused, full)
        for write in (lambda: bank.add("c", vector(3)), lambda: bank.replace("a", vector(3))):
            with pytest.raises(AdapterError, match=r"No space left on device\. Nothing saved before is lost"):
                write()
    assert bank.names() == ["a", "b"] and torch.equal(bank.get("a"), vector(1))
    bank.add("c", vector(3))
    assert torch.equal(AdapterBank(bank.folder).get("c"), vector(3))


def test_the_systems_own_limit_of_a_file(bank: AdapterBank) -> None:
    size = (bank.folder / "theta_d.safetensors").stat().st_size

    def add_beyond_it() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        with pytest.raises(AdapterError, match="Nothing saved before is lost"):
            bank.add("c", vector(3))

    in_child(add_beyond_it)
    assert (bank.folder / "theta_d.safetensors").stat().st_size == size
    assert torch.equal(bank.get("a"), vector(1)) and bank.names() == ["a", "b"]


def test_a_full_disk_of_the_database_is_one_sentence(bank: AdapterBank) -> None:
    with bank._index.change() as change:
        change._connection.execute("PRAGMA max_page_count = 1")
    with pytest.raises(AdapterError, match=r"full\. Nothing saved before is lost"):
        bank.add_many({f"a long name, so that a page is full soon {i}": vector(i) for i in range(200)})
    assert bank.names() == ["a", "b"]


def test_a_vector_that_changes_while_it_is_copied_is_read_again(bank: AdapterBank, monkeypatch) -> None:
    other, read, calls = AdapterBank(bank.folder), Slots.read, []

    def torn(self: Slots, slot: int):
        row = read(self, slot)
        if len(calls) < 2:  # meanwhile the slot goes to another name
            calls.append(slot)
            other.replace("a", vector(10 + len(calls)))
            other.replace("b", vector(20 + len(calls)))
            row[D // 2 :] = -1
        return row

    monkeypatch.setattr(Slots, "read", torn)
    assert torch.equal(bank.get("a"), vector(12)) and len(calls) == 2


def test_readers_wait_for_no_writer(bank: AdapterBank) -> None:
    reader = AdapterBank(bank.folder)
    with bank._index.change() as change:
        change.remove("a")
        assert torch.equal(reader.get("a"), vector(1)) and reader.names() == ["a", "b"]
        assert torch.equal(bank.get("a"), vector(1))  # of the same object, too
        assert AdapterBank(bank.folder).names() == ["a", "b"]
    assert reader.names() == ["b"]


def test_writers_wait_for_each_other_and_say_so_when_it_takes_too_long(bank: AdapterBank, monkeypatch) -> None:
    monkeypatch.setattr("uniproj.bank.connection._PATIENCE", 0.05)
    with bank._index.change(), pytest.raises(AdapterError, match=r"database is locked.*wait for another writer"):
        AdapterBank(bank.folder).add("c", vector(3))
    bank.add("c", vector(3))


def test_a_creation_that_fails_leaves_nothing(bank: AdapterBank, tmp_path, monkeypatch) -> None:
    bank.export("a", tmp_path / "adapter")
    monkeypatch.setattr("uniproj.bank.bank.Index.create", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        AdapterBank.create(tmp_path / "other", tmp_path / "adapter")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "bank"]
