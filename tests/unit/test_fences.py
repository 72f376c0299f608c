"""Fences: terms and epochs only rise, across restarts and crashes, under one lock."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.devices import NONE_MOVED, RESERVE, Devices
from coordinator.fences import RESERVED_BYTES, Fences, SupersededError
from coordinator.journal.file import JournalFile
from echelon.errors import ConfigError
from tests.unit.test_journal_faults import failing


def test_each_opening_raises_the_term_and_keeps_epochs_and_cluster(tmp_path: Path) -> None:
    first = Fences.open(tmp_path / "state")
    assert (first.term, first.epoch(0)) == (1, 0)
    first.persist_epoch(0, 1)
    first.persist_epoch(1, 5)
    first.persist_epoch(0, 2)
    first.close()
    second = Fences.open(tmp_path / "state")
    assert (second.term, second.epoch(0), second.epoch(1), second.cluster) == (2, 2, 5, first.cluster)
    second.close()


def test_numbers_are_on_disk_when_the_call_returns(tmp_path: Path) -> None:
    fences = Fences.open(tmp_path)
    assert json.loads((tmp_path / "term").read_text())["term"] == 1
    fences.persist_epoch(0, 1)
    assert json.loads((tmp_path / "term").read_text())["epochs"] == {"0": 1}
    fences.close()


def test_where_ranks_have_moved_is_kept_beside_the_epochs(tmp_path: Path) -> None:
    """And a state directory of before there were any is read as one without."""
    (tmp_path / "term").write_text(json.dumps({"cluster": "c0ffee", "term": 4, "epochs": {"0": 9}}))
    fences = Fences.open(tmp_path)
    assert fences.devices == NONE_MOVED
    moved = Devices({(0, 1): (RESERVE, 0)}, {(0, 1): "node"})
    fences.persist_devices(moved)
    fences.persist_epoch(0, 10)
    fences.close()
    successor = Fences.open(tmp_path)
    assert (successor.devices, successor.epoch(0), successor.term) == (moved, 10, 6)
    successor.close()


def test_an_epoch_never_falls(tmp_path: Path) -> None:
    fences = Fences.open(tmp_path)
    fences.persist_epoch(0, 3)
    with pytest.raises(AssertionError):
        fences.persist_epoch(0, 3)
    fences.close()


def test_one_that_was_replaced_can_take_no_number(tmp_path: Path) -> None:
    """Its lock file was removed, so a successor could begin beside it."""
    old = Fences.open(tmp_path)
    old.persist_epoch(0, 1)
    (tmp_path / "lock").unlink()
    new = Fences.open(tmp_path)
    new.persist_epoch(0, 2)
    with pytest.raises(SupersededError, match="taken term 2; this one, of term 1"):
        old.persist_epoch(0, 3)
    with pytest.raises(SupersededError):
        old.check()
    new.check()
    assert json.loads((tmp_path / "term").read_text())["epochs"] == {"0": 2}
    for fences in (old, new):
        fences.close()


def test_a_file_that_another_machine_has_replaced_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network's file system says so of the one that is open."""

    def stale(descriptor: int) -> os.stat_result:
        raise OSError(errno.ESTALE, "Stale file handle")

    old = Fences.open(tmp_path)
    old.check()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", stale)
        old.check()
        (tmp_path / "lock").unlink()
        new = Fences.open(tmp_path)
        with pytest.raises(SupersededError):
            old.check()
        new.check()
    for fences in (old, new):
        fences.close()


def test_the_next_number_finds_its_room_reserved(tmp_path: Path) -> None:
    """On a disk that is full since, it is written over blocks that are there already."""
    fences = Fences.open(tmp_path)
    for epoch in (1, 2, 3):
        reserve = (tmp_path / "term.new-1").stat()
        fences.persist_epoch(0, epoch)
        written = (tmp_path / "term").stat()
        assert (written.st_ino, written.st_size, written.st_blocks) == (reserve.st_ino, 4096, reserve.st_blocks)
        assert reserve.st_size == 4096
    fences.close()


def test_a_successor_finds_room_on_a_full_disk_in_what_its_predecessor_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite

    def full(descriptor: int, content: bytes, offset: int) -> int:
        if len(content) == RESERVED_BYTES and not os.fstat(descriptor).st_blocks:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, content, offset)

    with pytest.raises(ConfigError, match="No space left"), monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        Fences.open(tmp_path / "first")
    Fences.open(tmp_path).close()
    (tmp_path / "term.new-1~").write_text("somebody's own")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        Fences.open(tmp_path).close()
    third = Fences.open(tmp_path)
    assert third.term == 3
    third.close()
    assert sorted(path.name for path in tmp_path.glob("term*")) == ["term", "term.new-1~", "term.new-3"]


def test_one_that_is_stopped_as_it_begins_to_write_does_not_write_over_its_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that it has opened is not the one that its successor puts in the place of the term."""
    old, pwrite = Fences.open(tmp_path), os.pwrite

    def begin_a_successor(descriptor: int, content: bytes, offset: int) -> int:
        monkeypatch.undo()
        (tmp_path / "lock").unlink()
        Fences.open(tmp_path).close()
        return pwrite(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", begin_a_successor)
    with pytest.raises(SupersededError):
        old.persist_epoch(0, 1)
    old.close()
    numbers = json.loads((tmp_path / "term").read_text())
    assert (numbers["term"], numbers["epochs"]) == (2, {})


def test_a_directory_in_use_is_refused_with_its_holder_and_free_once_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time, coordinator.fences as f;"
        "held = f.Fences.open(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=rf"in use by another coordinator \(pid {holder.pid}\)"):
            Fences.open(tmp_path, patience_s=0.1)
    finally:
        holder.kill()
        holder.communicate()
    fences = Fences.open(tmp_path)
    assert fences.term == 2
    fences.close()


def test_damage_and_unusable_directories_are_named(tmp_path: Path) -> None:
    (tmp_path / "term").write_text("{")
    with pytest.raises(ConfigError, match="term is damaged"):
        Fences.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        Fences.open(tmp_path / "file" / "state")


def test_one_that_is_stopped_while_it_syncs_an_epoch_does_not_put_its_term_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, fsync = Fences.open(tmp_path), os.fsync

    def begin_a_successor(descriptor: int) -> None:
        monkeypatch.undo()
        fsync(descriptor)
        (tmp_path / "lock").unlink()
        Fences.open(tmp_path).close()

    monkeypatch.setattr(os, "fsync", begin_a_successor)
    with pytest.raises(SupersededError):
        old.persist_epoch(0, 1)
    old.close()
    numbers = json.loads((tmp_path / "term").read_text())
    assert (numbers["term"], numbers["epochs"]) == (2, {})


SLEEPER = """
import os, pathlib, signal, sys
from coordinator.devices import NONE_MOVED, RESERVE, Devices
from coordinator.fences import Fences
from coordinator.journal.file import JournalFile
from tests.unit.test_journal_file import append, opened
state = pathlib.Path(sys.argv[1])
fences = Fences.open(state)
journal = JournalFile(state / "journal", fences.term, segment_bytes=1, check_term=fences.check)
append(journal, opened("before"))
print("ready", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
for attempt in (lambda: append(journal, opened("late")), lambda: fences.persist_epoch(0, 9), fences.check):
    for _ in range(3):
        try:
            attempt()
            print("accepted", flush=True)
        except OSError as error:
            print("refused", error, flush=True)
"""


@pytest.mark.parametrize("room", [True, False])
def test_a_stopped_coordinator_that_wakes_after_its_successor_began_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    """Nobody has killed it, and its lock was lost. On a full disk its successor has no segment of its own yet."""
    root = Path(__file__).parents[2]
    sleeper = subprocess.Popen([sys.executable, "-c", SLEEPER, str(tmp_path)], cwd=root, stdout=subprocess.PIPE)
    try:
        assert sleeper.stdout is not None and sleeper.stdout.readline() == b"ready\n"
        os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED | os.WNOWAIT)
        (tmp_path / "lock").unlink()
        fences = Fences.open(tmp_path)
        fences.persist_epoch(0, 1)
        with monkeypatch.context() if room else failing(monkeypatch, "write"):
            JournalFile(tmp_path / "journal", fences.term).close()
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        sleeper.send_signal(signal.SIGCONT)
        told, _ = sleeper.communicate(timeout=60)
    finally:
        sleeper.kill()
        sleeper.communicate()
    assert [line.split()[0] for line in told.decode().splitlines()] == ["refused"] * 9
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    fences.check()
    fences.close()
