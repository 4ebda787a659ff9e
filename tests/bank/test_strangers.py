"""A bank that a stranger made, or that somebody changed under an open one: a sentence, and no hang, signal or loss."""

import json
import os
import shutil
import signal
import sqlite3
import struct
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.bank.models import D, vector
from tests.forked import die, dies_in_child, exitcode, in_child, limit
from uniproj import AdapterError
from uniproj.bank import AdapterBank
from uniproj.bank.folder import appearing
from uniproj.bank.index import Change, Index
from uniproj.bank.slots import Slots

BACKUP = r"backup \(AdapterBank\.backup\)"


@pytest.fixture(autouse=True)
def no_hang():
    """The signal that ends a test which waits for ever."""

    def give_up(*_: object) -> None:
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def filled(bank: AdapterBank) -> AdapterBank:
    bank.add_many({f"{i}": vector(i) for i in range(5)})
    return bank


def _vectors(bank: AdapterBank) -> Path:
    return bank.folder / "theta_d.safetensors"


def _index(bank: AdapterBank) -> Path:
    return bank.folder / "index.sqlite"


def _sql(bank: AdapterBank, *script: str) -> None:
    bank.close()
    with closing(sqlite3.connect(_index(bank))) as database:
        database.executescript(";".join(script))


# ---- forks and the caller's code ----------------------------------------------------------------


def test_pairs_that_read_the_bank_while_another_thread_forks(filled: AdapterBank) -> None:
    def pairs():
        for i in range(3):
            thread = threading.Thread(target=in_child, args=(lambda: None,))
            thread.start()
            time.sleep(0.2)  # so that the fork waits for whatever is held
            yield f"copy {i}", filled.get(f"{i}")
            thread.join()

    filled.add_many(pairs())
    assert all(torch.equal(filled.get(f"copy {i}"), vector(i)) for i in range(3))


@pytest.mark.parametrize("count", [3, 600])
def test_pairs_that_fork_and_write_the_bank_lose_nothing(count: int, filled: AdapterBank) -> None:
    def pairs():
        for i in range(count):
            if i == count - 1:
                in_child(lambda: filled.replace("0", vector(1000)))
                filled.delete("1")
            yield f"new {i}", vector(100 + i)

    filled.add_many(pairs())
    assert len(filled) == 4 + count and "1" not in filled and torch.equal(filled.get("0"), vector(1000))
    assert all(torch.equal(filled.get(f"new {i}"), vector(100 + i)) for i in range(count))
    assert sorted(p.name for p in filled.folder.iterdir() if "-" not in p.name) == [
        "index.sqlite",
        "theta_d.safetensors",
    ]


def test_pairs_do_not_go_on_in_the_child(filled: AdapterBank) -> None:
    children = []

    def pairs():
        for i in range(600):
            if i == 300:
                children.append(os.fork())
                if children == [0]:
                    limit()
            yield f"new {i}", vector(i)

    try:
        filled.add_many(pairs())
    except AdapterError as error:
        if children == [0]:
            os._exit(0 if "must end in the process" in str(error) else 1)
        raise
    if children == [0]:
        os._exit(2)
    assert exitcode(children[0]) == 0
    assert all(torch.equal(filled.get(f"new {i}"), vector(i)) for i in range(600))


# ---- files that change under an open bank -------------------------------------------------------


@pytest.mark.parametrize("change", ["cut", "emptied", "zeroed", "copied over"])
def test_vectors_that_are_overwritten_under_an_open_bank_are_a_sentence(
    change: str, filled: AdapterBank, model, tmp_path
) -> None:
    AdapterBank.create(tmp_path / "small", model).close()
    content = _vectors(filled).read_bytes()
    _vectors(filled).write_bytes(
        {
            "cut": content[:4096],
            "emptied": b"",
            "zeroed": bytes(len(content)),
            "copied over": (tmp_path / "small" / "theta_d.safetensors").read_bytes(),
        }[change]
    )
    with pytest.raises(AdapterError, match=BACKUP):
        filled.get("4")


@pytest.mark.parametrize("change", ["replaced", "gone"])
def test_vectors_that_are_replaced_under_an_open_bank_take_no_write(change: str, filled: AdapterBank, tmp_path) -> None:
    content = _vectors(filled).read_bytes()
    _vectors(filled).unlink()
    if change == "replaced":
        (tmp_path / "other").write_bytes(content)
        os.replace(tmp_path / "other", _vectors(filled))
    uses = (lambda: filled.get("4"), lambda: filled.add("x", vector(9)), lambda: filled.delete("4"))
    for use in uses:
        with pytest.raises(AdapterError, match="must be the file that was opened"):
            use()
    if change == "replaced":
        assert torch.equal(AdapterBank(filled.folder).get("4"), vector(4))
        assert _vectors(filled).read_bytes() == content


@pytest.mark.parametrize("change", ["index gone", "index replaced", "log gone", "folder moved"])
def test_an_index_that_is_replaced_under_an_open_bank_takes_no_write(
    change: str, filled: AdapterBank, tmp_path
) -> None:
    if change == "index gone":
        _index(filled).unlink()
    elif change == "index replaced":
        shutil.copy(_index(filled), tmp_path / "other")
        os.replace(tmp_path / "other", _index(filled))
    elif change == "log gone":
        _index(filled).with_name("index.sqlite-wal").unlink()
    else:
        filled.folder.rename(tmp_path / "moved")
    uses = (
        lambda: filled.add("x", vector(9)),
        lambda: filled.replace("1", vector(9)),
        lambda: filled.delete("1"),
        lambda: filled.get("1"),
        lambda: filled.names(),
        lambda: "1" in filled,
        lambda: filled.backup(tmp_path / "copy"),
    )
    for use in uses:
        with pytest.raises(AdapterError, match=r"must be the file that was opened, got another.*Open the bank again"):
            use()
    assert not (tmp_path / "copy").exists()


def test_an_index_that_is_replaced_within_a_transaction_is_an_error(filled: AdapterBank, tmp_path) -> None:
    shutil.copy(_index(filled), tmp_path / "other")
    with pytest.raises(AdapterError, match="must be the file that was opened"), filled._change() as change:
        change.remove("1")
        os.replace(tmp_path / "other", _index(filled))


# ---- copies without the log ---------------------------------------------------------------------


def _copy_of_the_two_files(bank: AdapterBank, to: Path) -> Path:
    to.mkdir()
    for name in ("theta_d.safetensors", "index.sqlite"):
        shutil.copy(bank.folder / name, to)
    return to


@pytest.mark.parametrize("write", ["add", "replace", "delete"])
def test_a_copy_without_the_last_changes_is_refused(write: str, filled: AdapterBank, tmp_path) -> None:
    with pytest.raises(AdapterError, match="copied without"):  # a new bank, of which nothing is in the two files yet
        AdapterBank(_copy_of_the_two_files(filled, tmp_path / "new"))
    filled.close()  # all is in the two files
    whole = AdapterBank(_copy_of_the_two_files(filled, tmp_path / "whole"))
    assert whole.names() == filled.names()
    if write == "add":
        filled.add("x", vector(9))
    elif write == "replace":
        filled.replace("1", vector(9))
    else:
        filled.delete("1")
    for more in ([], ["index.sqlite-shm"]):
        folder = _copy_of_the_two_files(filled, tmp_path / f"stale {len(more)}")
        for name in more:
            shutil.copy(filled.folder / name, folder)
        with pytest.raises(AdapterError, match=r"copied without index\.sqlite-wal.*" + BACKUP):
            AdapterBank(folder)
    assert AdapterBank(filled.folder).names() == filled.names()


def test_a_bank_of_an_earlier_version_opens_and_gets_its_count_with_the_next_write(
    filled: AdapterBank, tmp_path
) -> None:
    filled.close()
    line = b',"uniproj.bank.written":"%20d"' % 5
    content = _vectors(filled).read_bytes()
    assert content.count(line) == 1
    blank = content.replace(line + b"}}", b"}}" + b" " * len(line))
    _vectors(filled).write_bytes(blank)
    old = AdapterBank(filled.folder)
    assert old._slots.written() == 0 and torch.equal(old.get("3"), vector(3))
    old.add("x", vector(9))
    assert old._slots.written() == 6
    assert {k: torch.equal(old.get(k), vector(int(k))) for k in "01234"} == dict.fromkeys("01234", True)
    length = struct.unpack("<Q", _vectors(filled).read_bytes()[:8])[0]
    metadata = json.loads(_vectors(filled).read_bytes()[8 : 8 + length])["__metadata__"]
    assert metadata == json.loads(content[8 : 8 + length])["__metadata__"] | {"uniproj.bank.written": f"{6:20d}"}
    with pytest.raises(AdapterError, match="copied without"):
        AdapterBank(_copy_of_the_two_files(old, tmp_path / "stale"))


@pytest.mark.parametrize("step", ["before the commit", "after the commit"])
def test_a_kill_around_the_commit_leaves_a_bank_that_opens(step: str, filled: AdapterBank, monkeypatch) -> None:
    where, what = {"before the commit": (Change, "last"), "after the commit": (Slots, "note")}[step]
    with monkeypatch.context() as patch:
        patch.setattr(where, what, die)
        dies_in_child(lambda: filled.delete("1"))
    for seen in (filled, AdapterBank(filled.folder)):
        assert ("1" in seen) == (step == "before the commit") and torch.equal(seen.get("0"), vector(0))
    filled.add("x", vector(9))
    assert filled._slots.written() == (6 if step == "before the commit" else 7)


# ---- what is no regular file, or has no end -----------------------------------------------------


@pytest.mark.parametrize("name", ["theta_d.safetensors", "index.sqlite", "index.sqlite-wal", "index.sqlite-shm"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_regular_file_is_refused(name: str, kind: str, filled: AdapterBank) -> None:
    filled.close()
    path = filled.folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(AdapterError, match="pipe or device"):
        AdapterBank(filled.folder)


def test_a_journal_of_another_kind_is_not_played_back(filled: AdapterBank) -> None:
    filled.close()
    (filled.folder / "index.sqlite-journal").write_bytes(b"")
    with pytest.raises(AdapterError, match=r"index\.sqlite-journal must not be there"):
        AdapterBank(filled.folder)


@pytest.mark.parametrize("length", [10**11, 2**63, 2**64 - 8, 2**24 + 8184, 4088 + 2**16])
def test_a_header_that_claims_more_than_there_can_be_is_not_read(length: int, filled: AdapterBank) -> None:
    filled.close()
    with _vectors(filled).open("r+b") as file:
        file.write(struct.pack("<Q", length))
        if length in (10**11, 2**24 + 8184):  # a hole, so that the file is as long as it says
            file.truncate(length + 2**20)
    with pytest.raises(AdapterError, match=rf"got a header of {length:,} bytes.*" + BACKUP):
        AdapterBank(filled.folder)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 4000,
        b'{"theta_d":{"dtype":"F32","shape":[1,1e400]},"__metadata__":{}}',
        b'{"theta_d":{"dtype":"F32","shape":[1,true]},"__metadata__":{}}',
        b'{"theta_d":{"dtype":"F32","shape":[1,-60]},"__metadata__":{}}',
        b'{"theta_d":{"dtype":"F32","shape":[1,60,1]},"__metadata__":{}}',
        b'{"theta_d":{"dtype":"F32","shape":[1,%s]},"__metadata__":{}}' % (b"9" * 3900),
        b'{"theta_d":{"dtype":"F32","shape":[1,9223372036854775807]},"__metadata__":{}}',
        b'{"theta_d":{"dtype":["F32"],"shape":[1,60]},"__metadata__":{}}',
        b'{"theta_d":{"dtype":"F32","shape":[1,60]},"__metadata__":["a"]}',
        b'{"theta_d":{"dtype":"F32","shape":[1,60]},"__metadata__":{"uniproj.d":5}}',
        b"[]",
        b"\x00" * 20,
    ],
)
def test_a_hostile_header_is_a_sentence(header: bytes, filled: AdapterBank) -> None:
    filled.close()
    with _vectors(filled).open("r+b") as file:
        file.write(struct.pack("<Q", 4088) + header.ljust(4088))
    with pytest.raises(AdapterError, match=BACKUP):
        AdapterBank(filled.folder)


ENDLESS = (
    "WITH RECURSIVE n(x) AS (SELECT 0 UNION ALL SELECT x + 1 FROM n) SELECT x AS version, x || '' AS name, 0 AS slot"
)
SCHEMAS = {
    "view": ["DROP TABLE adapters", f"CREATE VIEW adapters AS {ENDLESS}, 0 AS crc FROM n"],
    "trigger": ["CREATE TRIGGER t AFTER INSERT ON adapters BEGIN DELETE FROM adapters; END"],
    "column": ["ALTER TABLE adapters ADD COLUMN more"],
    "computed column": ["ALTER TABLE free ADD COLUMN more AS (abs(slot))"],
    "table": ["CREATE TABLE more (x)"],
    "index": ["CREATE INDEX more ON adapters (crc)"],
    "nothing": ["DROP TABLE adapters", "DROP TABLE free"],
}


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_database_with_other_than_a_banks_tables_is_refused_before_it_is_asked(
    kind: str, filled: AdapterBank
) -> None:
    _sql(filled, *SCHEMAS[kind])
    with pytest.raises(AdapterError, match=r"must hold the tables of a bank and nothing else, got .*" + BACKUP):
        AdapterBank(filled.folder)


ROWS = {
    "a slot before the first": ("UPDATE adapters SET slot = -1 WHERE name = '3'", "must have slot -1, got 5 slots"),
    "a slot after the last": (f"UPDATE adapters SET slot = {2**62} WHERE name = '3'", rf"must have {2**62 + 1} slots"),
    "a slot of text": ("UPDATE adapters SET slot = 'a' WHERE name = '3'", "must hold whole numbers, got 'a'"),
    "a slot of bytes": ("UPDATE adapters SET slot = x'00' WHERE name = '3'", "must hold whole numbers, got b"),
    "half a slot": ("UPDATE adapters SET slot = 2.5 WHERE name = '3'", "must hold whole numbers, got 2.5"),
    "a sum of text": ("UPDATE adapters SET crc = 'a' WHERE name = '3'", "must hold whole numbers, got 'a'"),
    "a name of bytes": ("UPDATE adapters SET name = x'ff' WHERE name = '2'", r"names of text, got b'\\xff'"),
    "a name that is no text": ("UPDATE adapters SET name = CAST(x'ff' AS TEXT) WHERE name = '2'", "decode"),
    "a long name": ("UPDATE adapters SET name = hex(zeroblob(2000000)) WHERE name = '2'", "too big"),
    "a count of text": ("UPDATE sqlite_sequence SET seq = 'a'", "must hold whole numbers, got 'a'"),
    "no free slot in the file": ("INSERT INTO free VALUES (7)", "must have 8 slots, got 5"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_hostile_rows_are_sentences(kind: str, filled: AdapterBank) -> None:
    script, message = ROWS[kind]
    _sql(filled, script)
    with pytest.raises(AdapterError, match=message):
        opened = AdapterBank(filled.folder)
        opened.names()
        opened.get("3")


def test_a_free_slot_before_the_first_is_not_written(filled: AdapterBank) -> None:
    _sql(filled, "INSERT INTO free VALUES (-1)")
    content = _vectors(filled).read_bytes()
    with pytest.raises(AdapterError, match="must have slot -1, got 5 slots"):
        AdapterBank(filled.folder).add("x", vector(9))
    assert _vectors(filled).read_bytes() == content


def test_more_names_than_slots_are_not_read_through(filled: AdapterBank) -> None:
    rows = ",".join(f"('n{i}', {-i}, 0)" for i in range(2, 60))
    _sql(filled, f"INSERT INTO adapters (name, slot, crc) VALUES {rows}")
    opened = AdapterBank(filled.folder)
    for use in (opened.names, lambda: len(opened), lambda: list(opened)):
        with pytest.raises(AdapterError, match=r"no more names than the 5 slots of theta_d\.safetensors, got more"):
            use()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_no_bank_takes_are_not_given_out(value: float, filled: AdapterBank, model) -> None:
    row = vector(3).numpy().copy()
    row[7] = value
    content = _vectors(filled).read_bytes()
    _sql(filled, f"UPDATE adapters SET crc = {zlib.crc32(row.data)} WHERE name = '3'")
    _vectors(filled).write_bytes(content.replace(vector(3).numpy().tobytes(), row.tobytes()))
    opened = AdapterBank(filled.folder)
    for use in (lambda: opened.get("3"), lambda: opened.select(model, "3"), lambda: opened.batch(["2", "3"])):
        with pytest.raises(AdapterError, match="numbers of '3' must be finite, got NaN or inf"):
            use()
    assert torch.equal(opened.get("2"), vector(2))


def test_a_link_to_the_files_of_another_bank_is_read_and_not_written(filled: AdapterBank, tmp_path) -> None:
    filled.close()
    for linked in ("theta_d.safetensors", "index.sqlite"):
        folder = _copy_of_the_two_files(filled, tmp_path / f"with {linked}")
        (folder / linked).unlink()
        (folder / linked).symlink_to(filled.folder / linked)
        before = {path.name: path.read_bytes() for path in filled.folder.iterdir()}
        opened = AdapterBank(folder)
        assert torch.equal(opened.get("3"), vector(3))
        for write in (lambda o=opened: o.add("x", vector(9)), lambda o=opened: o.replace("3", vector(9))):
            with pytest.raises(AdapterError, match=r"symbolic links|readonly database"):
                write()
        opened.close()
        assert {path.name: path.read_bytes() for path in filled.folder.iterdir()} == before


@pytest.mark.parametrize("name", ["x" * 65_537, "ä" * 40_000])
def test_a_name_has_an_end(name: str, bank: AdapterBank) -> None:
    with pytest.raises(AdapterError, match="at most 65,536 bytes"):
        bank.add(name, vector(0))
    bank.add("x" * 65_536, vector(0))
    assert bank.names() == ["x" * 65_536] and len(bank.get("x" * 65_536)) == D


# ---- creation -----------------------------------------------------------------------------------


def test_what_a_killed_creation_left_does_not_block_the_next(bank: AdapterBank, model, tmp_path, monkeypatch) -> None:
    (tmp_path / f".users.{os.getpid()}").mkdir()  # of an earlier version
    (tmp_path / ".users.my-own").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Index, "create", die)
        dies_in_child(lambda: AdapterBank.create(tmp_path / "users", model))
    assert len(left := [p for p in tmp_path.iterdir() if p.name.endswith(".unfinished")]) == 1
    assert (left[0] / "theta_d.safetensors").exists()
    AdapterBank.create(tmp_path / "users", model)
    assert {p.name for p in tmp_path.iterdir()} == {"bank", "users", f".users.{os.getpid()}", ".users.my-own"}


def test_a_creation_that_goes_on_is_not_cleared(model, tmp_path) -> None:
    with appearing(tmp_path / "users") as part:
        (part / "mine").write_text("kept")
        AdapterBank.create(tmp_path / "users", model)
        assert (part / "mine").read_text() == "kept"
        shutil.move(tmp_path / "users", tmp_path / "first")
    assert (tmp_path / "users" / "mine").exists()


def test_new_folders_and_their_parents_reach_the_disk(model, tmp_path, monkeypatch) -> None:
    flushed: list[str] = []
    fsync: Callable[[int], None] = os.fsync

    def note(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    bank = AdapterBank.create(tmp_path / "a" / "b" / "bank", model)
    assert {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")} <= set(flushed)
    flushed.clear()
    bank.backup(tmp_path / "c" / "copy")
    assert {str(tmp_path), str(tmp_path / "c")} <= set(flushed)
