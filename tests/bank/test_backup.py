"""`AdapterBank.backup`: a whole bank of one moment, also under writers and kills; and banks that nobody may write."""

import ctypes
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.bank.models import D, vector
from tests.forked import die, dies_in_child, end, fork, heard_from_child, in_child
from uniproj import AdapterError
from uniproj.bank import AdapterBank
from uniproj.bank.slots import Slots


@pytest.fixture
def filled(bank: AdapterBank) -> AdapterBank:
    bank.add_many({f"{i}": vector(i) for i in range(40)})
    bank.delete("7")
    bank.replace("8", vector(108))
    return bank


def _same(copy: AdapterBank, bank: AdapterBank) -> bool:
    return copy.names() == bank.names() and all(torch.equal(copy.get(name), bank.get(name)) for name in bank)


def test_a_backup_is_the_bank_and_a_bank_of_its_own(filled: AdapterBank, tmp_path) -> None:
    filled.backup(tmp_path / "deep" / "copy")
    assert sorted(os.listdir(tmp_path / "deep" / "copy")) == ["index.sqlite", "theta_d.safetensors"]
    assert os.listdir(tmp_path / "deep") == ["copy"]
    copy = AdapterBank(tmp_path / "deep" / "copy")
    assert copy.header == filled.header and _same(copy, filled)
    copy.replace("8", vector(9))
    copy.add_many({f"new {i}": vector(i) for i in range(5)})
    assert torch.equal(filled.get("8"), vector(108)) and len(copy) == 44 and len(filled) == 39
    again = AdapterBank(tmp_path / "deep" / "copy")
    again.backup(tmp_path / "copy of the copy")
    assert _same(AdapterBank(tmp_path / "copy of the copy"), copy)


def test_a_backup_takes_the_place_of_nothing(filled: AdapterBank, tmp_path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for target in (filled.folder, tmp_path / "file", tmp_path / "link"):
        with pytest.raises(AdapterError, match=r"must not exist yet, got one\. .*choose another path"):
            filled.backup(target)
    assert (tmp_path / "file").read_text() == "kept" and torch.equal(filled.get("3"), vector(3))


def test_a_damaged_vector_is_named_and_no_folder_is_made(filled: AdapterBank, tmp_path) -> None:
    content = (filled.folder / "theta_d.safetensors").read_bytes()
    place = content.index(vector(3).numpy().tobytes())
    with (filled.folder / "theta_d.safetensors").open("r+b") as file:
        file.seek(place)
        file.write(b"\x01")
    with pytest.raises(AdapterError, match=r"numbers of '3' must be those that were written.*Replace or delete"):
        filled.backup(tmp_path / "copy")
    assert sorted(os.listdir(tmp_path)) == ["bank"]
    filled.delete("3")
    filled.backup(tmp_path / "copy")
    assert _same(AdapterBank(tmp_path / "copy"), filled)


def test_a_slot_that_is_given_to_another_meanwhile_is_copied_again(filled: AdapterBank, tmp_path, monkeypatch) -> None:
    writer, read, calls = AdapterBank(filled.folder), Slots.read, []

    def changed(self: Slots, slot: int):
        if len(calls) < 1:  # its old slot goes to the second
            calls.append(slot)
            for name in ("8", "8", "9", "9"):
                writer.replace(name, vector(200 + int(name)))
            writer.delete("10")
        return read(self, slot)

    monkeypatch.setattr(Slots, "read", changed)
    filled.backup(tmp_path / "copy")
    copy = AdapterBank(tmp_path / "copy")
    assert torch.equal(copy.get("8"), vector(208)) and "10" not in copy and _same(copy, filled)


def _numbered(seed: int) -> torch.Tensor:
    """A vector from which its number can be read, so that one of another name or moment is known."""
    return torch.full((D,), float(seed))


def test_under_writers_every_backup_is_one_moment(bank: AdapterBank, tmp_path) -> None:
    """Each transaction adds two names, and each name counts up: never half of one, never a step back."""
    bank.add_many({f"hot {k}": _numbered(0) for k in range(4)})

    def write(worker: int) -> None:
        for turn in range(1, 10**6):
            bank.add_many({f"{worker}/{turn}/a": _numbered(turn), f"{worker}/{turn}/b": _numbered(turn)})
            bank.replace(f"hot {2 * worker}", _numbered(turn))
            bank.replace(f"hot {2 * worker + 1}", _numbered(turn))
            if turn > 3:
                bank.delete(f"{worker}/{turn - 3}/a")

    writers: list[int] = []
    for worker in range(2):
        writers.append(fork(partial(write, worker)))
    try:
        for _ in range(3000):  # both have begun
            if {"0/1/b", "1/1/b"} <= set(bank.names()):
                break
            time.sleep(0.01)
        least = dict.fromkeys(range(2), 0)
        for k in range(8):
            if k == 4:
                os.kill(writers[0], signal.SIGKILL)
            bank.backup(tmp_path / f"copy {k}")
            copy = AdapterBank(tmp_path / f"copy {k}")
            names = copy.names()
            for worker in range(2):
                turns = sorted({int(n.split("/")[1]) for n in names if n.startswith(f"{worker}/")})
                last = turns[-1] if turns else 0
                assert turns == list(range(1, last + 1)) and last >= least[worker]
                hot = [int(copy.get(f"hot {2 * worker + j}")[0]) for j in range(2)]
                assert last >= hot[0] >= hot[1] >= last - 1
                if last:
                    assert f"{worker}/{last}/a" in names and f"{worker}/{last}/b" in names
                least[worker] = last
            for name in names:
                assert torch.equal(copy.get(name), _numbered(int(copy.get(name)[0])))
                assert name.startswith("hot") or int(copy.get(name)[0]) == int(name.split("/")[1])
        assert min(least.values()) > 0
    finally:
        for child in writers:
            end(child)
    bank.add("last", vector(0))


def test_a_backup_that_is_killed_leaves_no_folder_and_the_next_clears_its_part(
    filled: AdapterBank, tmp_path, monkeypatch
) -> None:
    places, read = tmp_path / "places", Slots.read
    for killed_after in range(0, 40, 8):
        calls = iter(range(killed_after))

        def dies(self: Slots, slot: int):
            return read(self, slot) if next(calls, None) is not None else die()  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(Slots, "read", dies)
            dies_in_child(lambda: filled.backup(places / "copy"))
        assert len(os.listdir(places)) == 1 and not (places / "copy").exists()
    filled.backup(places / "copy")
    assert os.listdir(places) == ["copy"] and _same(AdapterBank(places / "copy"), filled)


def test_a_full_disk_leaves_no_folder(filled: AdapterBank, tmp_path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", full)
        with pytest.raises(AdapterError, match=r"No space left on device\. Nothing saved before is lost"):
            filled.backup(tmp_path / "copy")
    assert os.listdir(tmp_path) == ["bank"]


def test_threads_fork_while_a_backup_is_taken(filled: AdapterBank, tmp_path) -> None:
    done = threading.Event()

    def fork() -> None:
        while not done.is_set():
            in_child(lambda: None)

    thread = threading.Thread(target=fork)
    thread.start()
    try:
        for k in range(5):
            filled.backup(tmp_path / f"copy {k}")
            filled.replace("3", vector(300 + k))
    finally:
        done.set()
        thread.join()
    assert torch.equal(AdapterBank(tmp_path / "copy 4").get("3"), vector(303))


# ---- banks that this process may not write ------------------------------------------------------

OTHER = 54321
# of sched.h: a namespace of mounts of its own
CLONE_NEWNS = 0x20000
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def _as_other(work: Callable[[], object]) -> None:
    """Do something as a user who owns nothing."""

    def become_other() -> None:
        os.setgroups([])
        os.setgid(OTHER)
        os.setuid(OTHER)
        work()

    in_child(become_other)


@pytest.fixture
def public(filled: AdapterBank) -> AdapterBank:
    """A bank whose folder every user may enter and read."""
    filled.close()
    for folder in (filled.folder, *filled.folder.parents):
        if Path(tempfile.gettempdir()) in folder.parents:
            folder.chmod(0o755)
    return AdapterBank(filled.folder)


def _reads(bank_folder: Path) -> AdapterBank:
    opened = AdapterBank(bank_folder)
    assert len(opened.names()) == len(opened) == 39 and "7" not in opened
    assert torch.equal(opened.get("8"), vector(108)) and torch.equal(opened.get("30"), vector(30))
    for write in (
        lambda: opened.add("x", vector(1)),
        lambda: opened.replace("3", vector(1)),
        lambda: opened.delete("3"),
    ):
        with pytest.raises(AdapterError, match=r"Permission denied|readonly database|Read-only file system"):
            write()
    return opened


@contextmanager
def _open_elsewhere(bank: AdapterBank) -> Iterator[None]:
    """The bank open in another process, which has written it and dies at the end."""
    told, tell = os.pipe()

    def write() -> None:
        bank.replace("3", vector(3))
        os.write(tell, b"x")
        signal.pause()

    child = fork(write)
    os.close(tell)
    try:
        assert heard_from_child(told)
        yield
    finally:
        end(child)
        os.close(told)


@needs_root
@pytest.mark.parametrize("state", ["closed", "open", "left by a kill"])
def test_another_users_bank_is_read_and_nothing_is_made_there(state: str, public: AdapterBank, tmp_path) -> None:
    target = tmp_path / "of the other"
    target.mkdir()
    os.chown(target, OTHER, OTHER)
    public.close()
    with ExitStack() as stack:
        if state != "closed":
            stack.enter_context(_open_elsewhere(public))
        if state == "left by a kill":
            stack.close()
        before = sorted(os.listdir(public.folder))
        assert len(before) == (2 if state == "closed" else 4)
        _as_other(lambda: _reads(public.folder).backup(target / "copy"))
        assert sorted(os.listdir(public.folder)) == before
    assert _same(AdapterBank(target / "copy"), public)


@needs_root
def test_a_log_that_cannot_be_read_is_not_passed_over(public: AdapterBank) -> None:
    with _open_elsewhere(public):
        pass
    (public.folder / "index.sqlite-shm").unlink()

    def work() -> None:
        with pytest.raises(AdapterError, match=r"-wal must have \S*-shm beside it.*backup \(AdapterBank\.backup\)"):
            AdapterBank(public.folder)

    _as_other(work)


@needs_root
def test_another_users_bank_is_read_while_it_is_written(public: AdapterBank) -> None:
    """Opened while nobody has it open, then written, closed and written again: each answer is of that time."""
    public.close()
    told, tell = os.pipe(), os.pipe()

    def work() -> None:
        opened = AdapterBank(public.folder)
        for turn in range(6):
            assert torch.equal(opened.get("3"), vector(3 if turn == 0 else 300 + turn)), turn
            assert len(opened) == 39 + turn
            os.write(tell[1], b"x")
            os.read(told[0], 1)

    def run() -> None:
        try:
            _as_other(work)
        finally:
            os.close(tell[1])

    thread = threading.Thread(target=run)
    thread.start()
    for turn in range(1, 6):
        assert heard_from_child(tell[0])
        public.replace("3", vector(300 + turn))
        public.add(f"turn {turn}", vector(turn))
        if turn % 2:
            public.close()
        os.write(told[1], b"x")
    assert heard_from_child(tell[0])
    os.write(told[1], b"x")
    thread.join()
    public.replace("3", vector(3))
    assert torch.equal(public.get("3"), vector(3))


@needs_root
def test_another_users_bank_is_backed_up_under_writers(public: AdapterBank, tmp_path) -> None:
    target = tmp_path / "of the other"
    target.mkdir()
    os.chown(target, OTHER, OTHER)

    def write() -> None:
        for turn in range(10**6):
            public.replace(f"{turn % 4}", _numbered(turn))
            public.replace("4", _numbered(turn))

    writer = fork(write)

    def work() -> None:
        opened = AdapterBank(public.folder)
        for k in range(5):
            opened.backup(target / f"copy {k}")

    try:
        _as_other(work)
    finally:
        end(writer)
    for k in range(5):
        copy = AdapterBank(target / f"copy {k}")
        assert len(copy) == 39
        for name in copy:
            assert copy.get(name).isfinite().all()


@needs_root
@pytest.mark.parametrize("state", ["closed", "open"])
def test_a_bank_on_a_read_only_file_system_is_read(state: str, filled: AdapterBank, tmp_path) -> None:
    filled.close()
    place = tmp_path / "mounted"
    place.mkdir()
    mount = f"mount --make-rprivate / && mount --bind '{filled.folder}' '{place}' && mount -o remount,bind,ro '{place}'"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")

    def work() -> None:
        # os.unshare comes with Python 3.12
        assert ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0
        subprocess.run(["sh", "-c", mount], check=True)
        _reads(place).backup(tmp_path / "copy")

    with _open_elsewhere(filled) if state == "open" else nullcontext():
        in_child(work)
    assert _same(AdapterBank(tmp_path / "copy"), filled)
