"""Disks that fill up, fail, forget and flip bits, and two coordinators at one journal: told, healed, never wrong."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.fences import SupersededError
from coordinator.journal import file as journal_file
from coordinator.journal.codec import FRAME, find_damage, frame, unframe
from coordinator.journal.damage import Damage
from coordinator.journal.file import JournalFile
from coordinator.journal.segment import Copy, Segment
from coordinator.journal.state import Assigned, Finished, Forgotten, JournalState, Opened, Record, Tokens
from coordinator.requests.events import Submit
from echelon.internal.link import Finish, Progress, Running
from tests.unit.core_shell import Shell, request
from tests.unit.test_journal_file import append, reopened, segments, until

FULL = OSError(errno.ENOSPC, "No space left on device")


@contextlib.contextmanager
def failing(patch: pytest.MonkeyPatch, name: str, error: OSError = FULL) -> Iterator[None]:
    """A call of the system that refuses."""

    def refuse(*_: object) -> None:
        raise error

    with patch.context() as inner:
        inner.setattr(os, name, refuse)
        yield


def opened(name: str) -> Record:
    return Opened(request(name))


# Disks that refuse.


def test_after_a_failed_fsync_everything_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may have dropped what it could not write, and says so once: a second fsync that succeeds is a lie."""
    journal = JournalFile(tmp_path, term=1, fsync=True)
    append(journal, opened("a"))
    with failing(monkeypatch, "fdatasync", OSError(errno.EIO, "Input/output error")):
        with pytest.raises(OSError, match="Input/output"):
            append(journal, opened("b"))
    (tmp_path / "000001.log").write_bytes(b"")  # what was lost
    until(journal, lambda: segments(tmp_path) == ["000002.log"])
    append(journal, opened("c"))
    journal.close()
    assert list(reopened(tmp_path).state.entries) == ["a", "b", "c"]


def test_what_is_kept_for_a_full_disk_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_file, "UNWRITTEN_BYTES", 500)
    journal = JournalFile(tmp_path, term=1)
    with failing(monkeypatch, "write"):
        for number in range(50):
            with pytest.raises(OSError, match="No space"):
                append(journal, opened(f"r{number}"))
            assert len(journal._unwritten) < 1000
    until(journal, lambda: segments(tmp_path) == ["000002.log"])
    append(journal, opened("last"))
    journal.close()
    assert len(reopened(tmp_path).state.entries) == 51


def test_what_is_kept_while_the_term_cannot_be_looked_up_has_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where no file can be opened, because so many are: that may last."""
    monkeypatch.setattr(journal_file, "UNWRITTEN_BYTES", 500)
    refuses = False

    def check_term() -> None:
        if refuses:
            raise OSError(errno.EMFILE, "Too many open files")

    journal = JournalFile(tmp_path, term=1, check_term=check_term)
    refuses = True
    for number in range(50):
        with pytest.raises(OSError, match="Too many open files"):
            append(journal, opened(f"r{number}"))
        assert len(journal._unwritten) < 1000
    refuses = False
    until(journal, lambda: segments(tmp_path) == ["000002.log"])
    append(journal, opened("last"))
    journal.close()
    assert len(reopened(tmp_path).state.entries) == 51


def test_half_a_frame_that_could_not_be_taken_back_is_taken_back_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = JournalFile(tmp_path, term=1)
    write = os.write

    def half(descriptor: int, content: bytes) -> int:
        if len(content) < 20:
            raise FULL
        return write(descriptor, bytes(content)[: len(content) - 10])

    with monkeypatch.context() as patch, failing(patch, "ftruncate"):
        patch.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space"):
            append(journal, opened("a"))
    append(journal, opened("b"))
    journal.close()
    again = reopened(tmp_path)
    assert list(again.state.entries) == ["a", "b"] and not again.damages


def test_a_successor_starts_on_a_full_disk_and_is_durable_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = JournalFile(tmp_path, term=1)
    append(journal, opened("a"), Tokens("a", 1, 0, (5,)))
    journal.close()
    with failing(monkeypatch, "write"):
        successor = JournalFile(tmp_path, term=2)
        assert successor.state == journal.state
        with pytest.raises(OSError, match="No space"):
            append(successor, Tokens("a", 1, 1, (6,)))
    assert reopened_copy(tmp_path).state.entries["a"].answers[0].ids == [5], "the last one's is still there"
    until(successor, lambda: segments(tmp_path) == ["000002.log"])
    append(successor, Tokens("a", 1, 2, (7,)))
    successor.close()
    assert reopened(tmp_path).state.entries["a"].answers[0].ids == [5, 6, 7]


def reopened_copy(directory: Path) -> JournalFile:
    """What a successor would read, were there one now."""
    copy = directory.parent / f"{directory.name}-copy"
    while True:
        shutil.rmtree(copy, ignore_errors=True)
        with contextlib.suppress(shutil.Error):  # renamed or removed meanwhile: not one moment's files
            shutil.copytree(directory, copy)
            return reopened(copy)


def test_a_directory_that_cannot_be_used_is_no_start(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text("a file")
    with pytest.raises(OSError, match="File exists"):
        JournalFile(tmp_path / "journal", term=1)


def test_a_journal_that_was_removed_is_told_and_begun_again(tmp_path: Path) -> None:
    journal = JournalFile(tmp_path / "journal", term=1)
    append(journal, opened("a"))
    until(journal, lambda: segments(tmp_path / "journal") == ["000001.log"])
    shutil.rmtree(tmp_path / "journal")
    with pytest.raises(OSError, match="removed"):
        append(journal, opened("b"))
    until(journal, lambda: (tmp_path / "journal" / "000002.log").exists())
    append(journal, opened("c"))
    journal.close()
    assert list(reopened(tmp_path / "journal").state.entries) == ["a", "b", "c"]


def test_one_that_was_replaced_and_wakes_writes_nothing(tmp_path: Path) -> None:
    """Its lock was lost; its successor has begun a segment of its own."""
    sleeper = JournalFile(tmp_path, term=1, segment_bytes=100)
    append(sleeper, opened("a"))
    successor = JournalFile(tmp_path, term=2)
    append(successor, opened("b"))
    until(successor, lambda: segments(tmp_path) == ["000002.log"])
    before = (tmp_path / "000002.log").read_bytes()
    for number in range(20):
        with pytest.raises(SupersededError, match=r"another coordinator writes this journal: 000002\.log"):
            append(sleeper, opened(f"late{number}"))
    sleeper.close()
    assert segments(tmp_path) == ["000002.log"]
    assert (tmp_path / "000002.log").read_bytes() == before
    append(successor, opened("c"))
    successor.close()
    assert list(reopened(tmp_path).state.entries) == ["a", "b", "c"]


@pytest.mark.parametrize("strikes", ["before the write", "in the write"])
def test_one_that_was_replaced_tells_nobody_and_writes_nothing_that_its_successor_would_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strikes: str
) -> None:
    """Its successor has found no room for a segment, so only the term says that it is there."""
    later: list[int] = []
    write = os.write

    def check_term() -> None:
        if later:
            raise SupersededError(errno.ESTALE, "another coordinator has taken term 2")

    def write_and_stop(descriptor: int, content: bytes) -> int:
        later.append(2)
        return write(descriptor, content)

    journal = JournalFile(tmp_path, term=1, check_term=check_term)
    append(journal, opened("a"))
    before = (tmp_path / "000001.log").read_bytes()
    with monkeypatch.context() as patch:
        if strikes == "in the write":
            patch.setattr(os, "write", write_and_stop)
        else:
            later.append(2)
        with pytest.raises(SupersededError, match="term 2"):
            append(journal, opened("b"))
    if strikes == "before the write":
        assert (tmp_path / "000001.log").read_bytes() == before
    journal.close()


def test_a_name_that_a_successor_has_taken_is_not_written_over(tmp_path: Path) -> None:
    """In the very moment between looking for one and taking it."""
    segment = Segment(tmp_path / "000002.tmp")
    segment.append(b"of the one that sleeps")
    (tmp_path / "000002.log").write_bytes(b"of its successor")
    with pytest.raises(FileExistsError):
        segment.publish(tmp_path / "000002.log")
    segment.remove()
    assert (tmp_path / "000002.log").read_bytes() == b"of its successor"


@pytest.mark.parametrize("links", [True, False])
def test_a_published_segment_goes_on_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    segment = Segment(tmp_path / "1.tmp")
    segment.append(b"a")
    with contextlib.nullcontext() if links else failing(monkeypatch, "link", OSError(errno.EPERM, "no links")):
        segment.publish(tmp_path / "1.log")
    segment.append(b"b")
    segment.close()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"1.log": b"ab"}


# Copies, made a piece at a time.

NAMES = ("a", "b", "c")
STEPS = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 5), st.booleans()), max_size=40)


@settings(max_examples=40, deadline=None)
@given(STEPS, st.integers(0, 20), st.integers(1, 400))
def test_a_copy_made_in_pieces_is_what_is_remembered(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, bool]], begin: int, piece_bytes: int
) -> None:
    """Whatever is opened, continued, ended or forgotten between any two pieces; also after all the records before."""
    state, content, copy = JournalState(), b"", None
    path = tmp_path_factory.mktemp("copy") / "000002.log"
    for place, (name, tokens, ends) in enumerate(steps):
        records = story(state, name, tokens, ends)
        state.apply_all(records)
        if place == begin:
            copy = Copy(state, 1, path)
        content += frame(records, 1)
        if copy and place > begin:
            copy.follow(frame(records, 1))
        if copy and not copy.complete:
            copy.go_on(piece_bytes)
    if copy is None:
        copy = Copy(state, 1, path)
    while not copy.complete:
        copy.go_on(piece_bytes)
    copy.segment.close()
    copied = unframe(copy.segment.path.read_bytes())[0]
    for records in (copied, [*unframe(content)[0], *copied]):
        again = JournalState()
        again.apply_all(records)
        assert again.entries == state.entries and again.last_attempt == state.last_attempt


def story(state: JournalState, name: str, tokens: int, ends: bool) -> list[Record]:
    """What happens next to the request of this name."""
    entry = state.entries.get(name)
    if entry is None:
        return [opened(name), Assigned(name, state.last_attempt + 1, 0, 1)]
    if entry.finished:
        return [Forgotten(name)] if ends else []
    first = len(entry.answers[0].ids)
    ids = tuple(range(first, first + tokens))
    more: list[Record] = [Tokens(name, entry.attempt, first, ids)] if ids else []
    return [*more, Finished(name, 1.0, (Finish.STOP,))] if ends else more


def test_no_append_copies_more_than_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop waits for each."""
    monkeypatch.setattr(journal_file, "PIECE_BYTES", 300)
    journal = JournalFile(tmp_path, term=1, segment_bytes=8000)
    sizes: list[int] = []
    write = os.write

    def measured(descriptor: int, content: bytes) -> int:
        sizes.append(len(content))
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", measured)
    for number in range(200):
        append(journal, opened(f"r{number}"))
    until(journal, lambda: segments(tmp_path) != ["000001.log"])
    assert max(sizes) < 600 < journal.size_bytes
    journal.close()
    assert len(reopened(tmp_path).state.entries) == 200


def test_a_copy_that_has_its_name_already_is_not_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lacks what the full disk refused, but it is what a successor reads."""
    journal = JournalFile(tmp_path, term=1, segment_bytes=1000)
    number = 0
    while journal._publishing is None:
        append(journal, opened(f"r{number}"))
        number += 1
    journal._publishing.result()
    with failing(monkeypatch, "write"), pytest.raises(OSError, match="No space"):
        append(journal, opened(f"r{number}"))
    assert len(reopened_copy(tmp_path).state.entries) == number
    until(journal, lambda: not journal._lost)
    append(journal, opened("last"))
    journal.close()
    assert len(reopened(tmp_path).state.entries) == number + 2


def test_a_crash_in_the_middle_of_a_copy_leaves_the_old_segment(tmp_path: Path) -> None:
    journal = JournalFile(tmp_path, term=1, segment_bytes=500)
    for number in range(20):
        append(journal, opened(f"r{number}"))
        assert len(reopened_copy(tmp_path).state.entries) == number + 1
    journal.close()


# Bytes that are not what was written.


def truth(name: str, place: int) -> int:
    """The token that the model draws there."""
    return 100 * (1 + NAMES.index(name)) + place


def written() -> Shell:
    """A coordinator with one request that has ended, one that is parked and one that runs."""
    shell = Shell()
    shell.open()
    for stream, name in enumerate(NAMES):
        shell.post(Submit(stream, request(name, max_tokens=6)))
    for place in range(4):
        for name in NAMES[:2]:
            attempt = shell.state.entries[name].attempt
            end = Finish.LENGTH if name == "a" and place == 3 else None
            shell.run(place, truth(name, place), name=name, attempt=attempt, finish=end)
    return shell


WRITTEN = written()
CONTENT = frame(WRITTEN.records, 1)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, len(CONTENT) - 1), st.integers(0, 255), st.booleans())
def test_no_damage_makes_a_wrong_token_or_an_exception(place: int, flip: int, cut: bool) -> None:
    """flip 0 leaves the byte as it was. Clients come back with all they have seen, and get the rest of the truth."""
    content = bytearray(CONTENT[:place] if cut else CONTENT)
    if not cut:
        content[place] ^= flip
    records, size_bytes = unframe(bytes(content))
    assert records == WRITTEN.records[: len(records)]
    damage = find_damage("000001.log", bytes(content), size_bytes)
    assert (damage is None) == (size_bytes == len(content))
    state = JournalState()
    state.apply_all(records)
    shell = Shell(state, term=2, records=list(records))
    running = [Running(name, WRITTEN.state.entries[name].attempt) for name in NAMES[:2]]
    for stream, name in enumerate(NAMES):
        held = tuple(WRITTEN.state.entries[name].answers[0].ids)
        shell.post(Submit(stream, request(name, max_tokens=6), (held,)))
    shell.open(*running)
    for name in NAMES[:2]:  # reports that were not acknowledged
        shell.run(4, truth(name, 4), name=name, attempt=WRITTEN.state.entries[name].attempt)
    for assign in shell.assigns():
        first = len(assign.choices[0].generated)
        rest = tuple(truth(assign.request, place) for place in range(first, 6))
        shell.run(first, *rest, name=assign.request, attempt=assign.attempt, finish=Finish.LENGTH)
    for name, entry in shell.state.entries.items():
        ids = entry.answers[0].ids
        assert ids == [truth(name, place) for place in range(len(ids))]
    for stream, name in enumerate(NAMES):
        held_count = len(WRITTEN.state.entries[name].answers[0].ids)
        ids = shell.ids(stream)
        assert ids == [truth(name, place) for place in range(held_count, held_count + len(ids))]


def test_a_record_of_a_later_version_ends_reading_with_its_reason() -> None:
    content = frame([opened("a")], 1)
    later = b"\xfa\x7f\x01x"  # a field that this version does not know
    content += FRAME.pack(len(later), checksum(later)) + later + frame([opened("b")], 1)
    records, size_bytes = unframe(content)
    assert records == [opened("a")]
    damage = find_damage("1.log", content, size_bytes)
    assert damage is not None and "later version" in damage.reason and damage.lost_bytes == len(content) - size_bytes


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content[:-3], "incomplete"),
        (lambda content: content + bytes(20), "incomplete"),
        (lambda content: content[:-3] + b"xyz", "checksum"),
    ],
)
def test_why_nothing_more_was_read(change: Callable[[bytes], bytes], reason: str, tmp_path: Path) -> None:
    journal = JournalFile(tmp_path, term=1)
    append(journal, opened("a"))
    append(journal, opened("b"))
    journal.close()
    path = tmp_path / "000001.log"
    path.write_bytes(change(path.read_bytes()))
    again = reopened(tmp_path)
    (damage,) = again.damages
    assert reason in damage.reason and damage.segment == "000001.log"
    assert damage.at_byte + damage.lost_bytes == len(change(frame([opened("a"), opened("b")], 1)))
    assert isinstance(damage, Damage)


def test_what_was_edited_with_the_right_checksum_is_believed_or_forgotten() -> None:
    """Nobody but the codec writes so; a record that fits nowhere costs the request that it names, and no other."""
    misfits: list[Record] = [Tokens("a", 1, 0, (1,), choice=5), Tokens("a", 1, 9, (1,)), Tokens("nobody", 1, 0, (1,))]
    for misfit in misfits:
        state = JournalState()
        state.apply_all(unframe(frame([opened("a"), opened("b"), misfit], 1))[0])
        assert list(state.entries) == (["a", "b"] if misfit == misfits[2] else ["b"])


def test_what_stands_in_the_journal_is_what_is_gone_on_from(tmp_path: Path) -> None:
    """A token that is edited on the disk is delivered, and the model goes on behind it: nothing is run from scratch."""
    shell, journal = Shell(), JournalFile(tmp_path, term=1)
    shell.open()
    shell.post(Submit(1, request()))
    shell.run(0, 5, 6, 7)
    journal.state.apply_all(shell.records)
    journal.append(shell.records)
    journal.close()
    path = tmp_path / "000001.log"
    records, _ = unframe(path.read_bytes())
    assert Tokens("r", 1, 0, (5, 6, 7)) in records
    edited = [Tokens("r", 1, 0, (5, 6, 8)) if isinstance(each, Tokens) else each for each in records]
    path.write_bytes(frame(edited, 1))
    successor = Shell(reopened(tmp_path).state, term=2)
    successor.post(Submit(1, request()))
    successor.open()
    (assign,) = successor.assigns()
    assert assign.choices == (Progress(0, (5, 6, 8)),) and assign.prompt == request().prompt
    assert successor.ids(1) == [5, 6, 8]


def checksum(payload: bytes) -> int:
    import google_crc32c

    return int(google_crc32c.value(payload))
