"""The journal file: what was appended is there again, whatever happened to the process or the disk in between."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator.journal.damage import Damage
from coordinator.journal.file import JournalFile
from coordinator.journal.state import Forgotten, Opened, Record, Tokens
from coordinator.requests.nouns import Request
from echelon.internal.link import Sampling


def opened(name: str) -> Record:
    return Opened(Request(name, b"d", "m", (1, 2), Sampling(0.0, 1.0, 0, 9, 0), 0.0, 0.0))


def append(journal: JournalFile, *records: Record) -> None:
    """As the core does it: folded first, then written."""
    journal.state.apply_all(records)
    journal.append(records)


def segments(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def until(journal: JournalFile, condition: Callable[[], bool]) -> None:
    """A copy goes on with what is appended, be it nothing; its fsync has a thread of its own."""
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s
        with contextlib.suppress(OSError):
            journal.append(())
        time.sleep(0.001)


def reopened(directory: Path) -> JournalFile:
    journal = JournalFile(directory, term=2)
    journal.close()
    return journal


def test_what_was_appended_is_read_again(tmp_path: Path) -> None:
    journal = JournalFile(tmp_path / "journal", term=1)
    append(journal, opened("a"), Tokens("a", 1, 0, (5, 6)))
    append(journal, opened("b"))
    journal.close()
    again = reopened(tmp_path / "journal")
    assert again.state == journal.state
    assert not again.damages
    assert segments(tmp_path / "journal") == ["000002.log"]


def test_a_term_that_cannot_be_looked_up_for_a_moment_costs_no_record_of_a_copy_under_way(tmp_path: Path) -> None:
    """As where no file can be opened, because so many are."""
    refuses = False

    def check_term() -> None:
        if refuses:
            raise OSError(errno.EMFILE, "Too many open files")

    journal = JournalFile(tmp_path, term=1, segment_bytes=2000, check_term=check_term)
    names = (f"r{number}" for number in range(1000))
    while journal._publishing is None:
        append(journal, opened(next(names)))
    journal._publishing.result()
    refuses = True
    with contextlib.suppress(OSError):  # or the copy takes over at once, and all is well
        append(journal, opened("last"))
    refuses = False
    until(journal, lambda: journal._copy is None)
    journal.close()
    assert "last" in reopened(tmp_path).state.entries


def test_a_torn_tail_is_left_out_and_never_written_behind(tmp_path: Path) -> None:
    journal = JournalFile(tmp_path, term=1)
    append(journal, opened("a"), Tokens("a", 1, 0, (5, 6)))
    journal.close()
    end = (tmp_path / "000001.log").stat().st_size
    with (tmp_path / "000001.log").open("ab") as file:
        file.write(b"\x30\x00\x00\x00torn")
    second = JournalFile(tmp_path, term=2)
    assert second.damages == [Damage("000001.log", end, 8, "its last record is incomplete")]
    append(second, Tokens("a", 1, 2, (7,)))
    second.close()
    assert reopened(tmp_path).state.entries["a"].answers[0].ids == [5, 6, 7]


def test_full_segments_are_replaced_by_what_is_still_remembered(tmp_path: Path) -> None:
    journal = JournalFile(tmp_path, term=1, segment_bytes=2000)
    append(journal, opened("kept"))
    for number in range(300):
        name = f"r{number}"
        append(journal, opened(name), Tokens(name, 1, 0, (1, 2, 3)), Forgotten(name))
        append(journal, Tokens("kept", 1, number, (number,)))
    until(journal, lambda: journal.size_bytes < 10_000 and len(segments(tmp_path)) == 1)
    journal.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 10_000
    assert len(segments(tmp_path)) == 1
    assert reopened(tmp_path).state.entries["kept"].answers[0].ids == list(range(300))


def test_a_crash_between_copy_and_removal_changes_nothing(tmp_path: Path) -> None:
    journal = JournalFile(tmp_path, term=1)
    append(journal, opened("a"), Tokens("a", 1, 0, (5, 6)))
    journal.close()
    old = (tmp_path / "000001.log").read_bytes()
    JournalFile(tmp_path, term=2).close()
    (tmp_path / "000001.log").write_bytes(old)  # not removed yet
    (tmp_path / "000003.tmp").write_bytes(b"half a copy")
    assert reopened(tmp_path).state == journal.state


@pytest.mark.parametrize("partly", [0, 11])
def test_after_a_full_disk_the_lost_records_go_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partly: int
) -> None:
    journal = JournalFile(tmp_path, term=1)
    append(journal, opened("a"))
    write, calls = os.write, [partly] if partly else []

    def full(descriptor: int, content: bytes) -> int:
        if calls:
            return write(descriptor, bytes(content)[: calls.pop()])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            append(journal, Tokens("a", 1, 0, (5,)))
    append(journal, Tokens("a", 1, 1, (6,)))
    journal.close()
    again = reopened(tmp_path)
    assert again.state.entries["a"].answers[0].ids == [5, 6]
    assert not again.damages


def test_no_room_for_compaction_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = JournalFile(tmp_path, term=1, segment_bytes=100)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse)
        patch.setattr(Path, "rename", refuse)
        for number in range(20):
            append(journal, opened(f"r{number}"))
        until(journal, lambda: "No space" in journal.not_compacted)
    in_charge = [name for name in segments(tmp_path) if name.endswith(".log")]
    assert in_charge == ["000001.log"], "the next attempt may have begun its draft"
    journal.close()
    assert len(reopened(tmp_path).state.entries) == 20


def test_appended_records_survive_sigkill(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from coordinator.journal.state import Forgotten
from coordinator.journal.damage import Damage
from coordinator.journal.file import JournalFile
from tests.unit.test_journal_file import append, opened
journal = JournalFile(Path({str(tmp_path)!r}), term=1)
append(journal, opened("a"), opened("b"), Forgotten("b"))
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(reopened(tmp_path).state.entries) == ["a"]


def test_one_write_per_batch_and_fsync_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    write, sync = os.write, os.fdatasync

    def count_write(descriptor: int, content: bytes) -> int:
        calls.append("write")
        return write(descriptor, content)

    def count_sync(descriptor: int) -> None:
        calls.append("sync")
        sync(descriptor)

    monkeypatch.setattr(os, "write", count_write)
    monkeypatch.setattr(os, "fdatasync", count_sync)
    for name, fsync in (("process", False), ("fsync", True)):
        journal = JournalFile(tmp_path / name, term=1, fsync=fsync)
        calls.clear()
        append(journal, opened("a"), Tokens("a", 1, 0, (5,)))
        journal.close()
        assert calls == ["write", "sync"][: 1 + fsync]
