"""Whether what is delivered is durable: told in events, in the cluster's status and in metrics, and what is refused."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from coordinator.events import EventLog
from coordinator.fences import SupersededError
from coordinator.journal.damage import Damage
from coordinator.journal.memory import NoJournal
from coordinator.journal.state import Forgotten, Record
from coordinator.metrics import Metrics
from coordinator.recorder import Recorder
from echelon.errors import OverloadedError

FULL = OSError(errno.ENOSPC, "No space left on device")


@dataclass
class Journal:
    """Refuses while `refusal` is set."""

    keeps: bool = True
    damages: Sequence[Damage] = ()
    size_bytes: int = 7
    not_compacted: str = ""
    refusal: OSError | None = None
    tries: list[tuple[Record, ...]] = field(default_factory=list)

    def append(self, records: Sequence[Record]) -> None:
        self.tries.append(tuple(records))
        if self.refusal:
            raise self.refusal

    def close(self) -> None:
        pass


@dataclass
class Site:
    journal: Journal
    events: EventLog = field(default_factory=lambda: EventLog(1))
    metrics: Metrics = field(default_factory=Metrics.create)
    changes: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.recorder = Recorder(self.journal, self.events, self.metrics)
        self.recorder.on_change = lambda: self.changes.append(self.recorder.durable)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events._events]

    def figure(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"echelon_{name}")


def test_a_full_disk_is_told_once_and_its_end_too() -> None:
    site = Site(Journal())
    assert (site.recorder.state, site.figure("journal_durable"), site.kinds()) == ("durable", 1, [])
    site.journal.refusal = FULL
    for _ in range(3):
        site.recorder.write([Forgotten("r")])
    assert site.kinds() == ["journal.failed"]
    assert site.recorder.state == "not durable: [Errno 28] No space left on device"
    assert (site.recorder.durable, site.figure("journal_durable")) == (False, 0)
    with pytest.raises(OverloadedError) as refused:
        site.recorder.check_writable("new")
    assert (refused.value.reason, refused.value.request_id) == ("JOURNAL_UNAVAILABLE", "new")
    site.journal.refusal = None
    site.recorder.write([])
    assert site.kinds() == ["journal.failed", "journal.recovered"]
    assert (site.recorder.state, site.figure("journal_durable"), site.changes) == ("durable", 1, [False, True])
    site.recorder.check_writable("new")


def test_without_records_nothing_is_written_unless_something_is_left_over() -> None:
    site = Site(Journal())
    site.journal.tries.clear()
    site.recorder.write([])
    assert site.journal.tries == []
    site.journal.refusal = FULL
    site.recorder.write([Forgotten("r")])
    site.recorder.write([])
    assert site.journal.tries == [(Forgotten("r"),), ()]


def test_a_journal_that_cannot_be_written_at_the_start_is_told() -> None:
    site = Site(Journal(refusal=FULL))
    assert site.kinds() == ["journal.failed"]
    assert not site.recorder.durable


def test_what_could_not_be_read_is_told() -> None:
    damage = Damage("000001.log", 10, 200, "a record does not match its checksum")
    site = Site(Journal(damages=(damage,)))
    (event,) = site.events._events
    assert (event.kind, event.subject) == ("journal.damaged", "000001.log")
    assert event.detail == {"at_byte": 10, "lost_bytes": 200, "reason": "a record does not match its checksum"}
    assert site.figure("journal_damaged_bytes") == 200


def test_a_journal_that_keeps_growing_is_told_once_for_each_reason() -> None:
    site = Site(Journal())
    for reason in ("no room", "no room", "", "not allowed"):
        site.journal.not_compacted = reason
        site.recorder.write([Forgotten("r")])
    assert [event.detail for event in site.events._events] == [{"error": "no room"}, {"error": "not allowed"}]
    assert site.recorder.durable


def test_no_journal_keeps_nothing_and_refuses_nothing() -> None:
    events = EventLog(1)
    recorder = Recorder(NoJournal(), events, Metrics.create())
    recorder.write([Forgotten("r")])
    recorder.check_writable("new")
    assert (recorder.state, recorder.durable, len(events)) == ("off", False, 0)
    recorder.close()


def test_of_a_step_that_a_successor_will_not_know_nobody_hears() -> None:
    site = Site(Journal())
    site.journal.refusal = SupersededError(errno.ESTALE, "another coordinator writes this journal")
    with pytest.raises(SupersededError):
        site.recorder.write([Forgotten("a")])
    assert site.kinds() == []
