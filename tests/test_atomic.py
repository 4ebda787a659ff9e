"""Temporary files belong to living writers, are nobody else's, and the names of new folders reach the disk."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.files import write_bytes
from tests.forked import die, dies_in_child, exitcode, fork, heard_from_child
from uniproj import atomic
from uniproj.format.disk import replace


def _by_adapter(path: Path, content: bytes) -> None:
    replace({path: content})


WRITERS = {"adapter": _by_adapter, "result": write_bytes}
BOTH = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@BOTH
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_nothing_stays_of_a_killed_writer(writer: str, moment: str, write: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write(path, b"old")

    def killed() -> None:
        setattr(os, moment, die)
        WRITERS[writer](path, b"new" * 9999)

    dies_in_child(killed)
    assert path.read_bytes() == b"old"
    assert len(_names(tmp_path)) == 2
    write(tmp_path / "other", b"x")
    assert _names(tmp_path) == {"a.bin", "other"}


@BOTH
def test_living_writers_keep_their_files(write: Any, tmp_path: Path) -> None:
    """Of this process in another thread, and of another process."""
    (other_begun, say_begun), (may_end, let_end) = os.pipe(), os.pipe()

    def theirs() -> Iterator[bytes]:
        os.close(let_end)  # of this process, which would wait for itself
        os.write(say_begun, b"x")
        os.read(may_end, 1)
        yield b"theirs"

    other = fork(lambda: replace({tmp_path / "theirs": theirs()}))
    os.close(say_begun)  # so that the end of a process that never begins is seen
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> Iterator[bytes]:
        yield b"a"
        begun.set()
        go_on.wait(60)
        yield b"b"

    thread = threading.Thread(target=lambda: replace({tmp_path / "mine": slow()}))
    thread.start()
    try:
        assert heard_from_child(other_begun) and begun.wait(60)
        write(tmp_path / "now", b"now")
        assert len(_names(tmp_path)) == 3
    finally:  # or both would wait for ever
        go_on.set()
        os.close(let_end)
        thread.join()
        exitcode(other)
        os.close(other_begun), os.close(may_end)
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found == {"mine": b"ab", "theirs": b"theirs", "now": b"now"}


@BOTH
def test_many_writers_of_one_folder(write: Any, tmp_path: Path) -> None:
    failed: list[Exception] = []

    def many(mine: int) -> None:
        try:
            for k in range(20):
                write(tmp_path / str(k % 3), bytes([mine]) * 1000)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=many, args=(mine,)) for mine in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and _names(tmp_path) == {"0", "1", "2"}


@BOTH
def test_a_planted_link_is_not_written_through(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    for name in (f".a.{os.getpid()}", f".a.{os.getpid()}.{threading.get_ident()}", ".uniproj-0123456789abcdef.part"):
        (tmp_path / "there").mkdir(exist_ok=True)
        (tmp_path / "there" / name).symlink_to(victim)
    write(tmp_path / "there" / "a", b"x")
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda n: "0123456789abcdef")
    with pytest.raises(ValueError, match="File exists"):
        write(tmp_path / "there" / "a", b"y")
    assert victim.read_bytes() == b"precious" and (tmp_path / "there" / "a").read_bytes() == b"x"


def test_only_files_of_dead_writers_are_removed(tmp_path: Path) -> None:
    name = ".uniproj-{}.part".format
    (tmp_path / name("0" * 16)).write_bytes(b"left")
    others = [name("1" * 16), name("2" * 16), name("3" * 16), name("4" * 15), ".part", ".a.b.12", ".uniproj-x.part"]
    os.mkfifo(tmp_path / others[0])
    (tmp_path / others[1]).mkdir()
    (tmp_path / others[2]).symlink_to(tmp_path / others[-1])
    for other in others[3:]:
        (tmp_path / other).write_bytes(b"theirs")
    replace({tmp_path / "a": b"x"})
    assert _names(tmp_path) == {"a", *others}


@BOTH
def test_the_permissions_stay_or_are_those_of_a_new_file(write: Any, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "a", b"x")
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
        for mode in (0o644, 0o600, 0o664):
            (tmp_path / "a").chmod(mode)
            write(tmp_path / "a", b"y")
            assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode
        (tmp_path / "link").symlink_to("a")
        write(tmp_path / "link", b"z")
        assert not (tmp_path / "link").is_symlink() and (tmp_path / "a").read_bytes() == b"y"
    finally:
        os.umask(before)


@BOTH
@pytest.mark.parametrize("made", [True, False], ids=["made by the caller", "new"])
def test_new_folders_reach_the_disk(made: bool, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT and the Trainer make the folder themselves, so each level counts as new."""
    flushed, fsync = [], os.fsync

    def note(descriptor: int) -> None:
        flushed.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    folder = tmp_path / "a" / "b" / "c"
    if made:
        folder.mkdir(parents=True)
    monkeypatch.setattr(os, "fsync", note)
    write(folder / "file", b"x")
    levels = [folder / "file", folder, folder.parent, folder.parent.parent, tmp_path]
    assert [level.stat().st_ino for level in levels] == flushed[: len(levels)]


@BOTH
@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_folders_that_cannot_be_flushed(
    refusal: int, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(refusal, os.strerror(refusal))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    if refusal == errno.EIO:
        with pytest.raises(ValueError, match=os.strerror(refusal)):
            write(tmp_path / "a", b"x")
    else:
        write(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


def test_a_file_system_without_locks_keeps_what_it_cannot_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(atomic.fcntl, "flock", refuse)
    left = tmp_path / f".uniproj-{'0' * 16}.part"
    left.write_bytes(b"of whom?")
    replace({tmp_path / "a": b"x"})
    assert _names(tmp_path) == {"a", left.name}


def test_a_file_taken_for_a_dead_writers_before_it_was_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, taken = atomic.fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not taken:
            taken.extend(tmp_path.iterdir())
            taken[0].unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(atomic.fcntl, "flock", late)
    replace({tmp_path / "a": b"x"})
    assert taken and _names(tmp_path) == {"a"}


def test_a_folder_whose_names_nobody_may_list_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> list[str]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "listdir", refuse)
    replace({tmp_path / "a": b"x"})
    assert (tmp_path / "a").read_bytes() == b"x"
