"""The coordinator's clock runs evenly while the machine's jumps, and what was written before keeps its distance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from coordinator.clock import ClockOrigin, SteadyClock
from coordinator.journal.file import JournalFile
from coordinator.journal.state import Finished, Opened, Record
from tests.unit.core_shell import Shell, request

HOUR_S = 3600.0


@dataclass
class Machine:
    """Its two clocks, one of which somebody may set."""

    wall_s: float = 1_700_000_000.0
    monotonic_s: float = 50.0

    def clock(self, boot_id: str = "boot") -> SteadyClock:
        """What a process that starts now goes by."""
        return SteadyClock(lambda: self.wall_s, lambda: self.monotonic_s, boot_id)

    def wait(self, seconds: float) -> None:
        self.wall_s += seconds
        self.monotonic_s += seconds


@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S])
def test_a_clock_that_is_set_changes_no_duration(jump_s: float) -> None:
    machine = Machine()
    clock = machine.clock()
    before = clock()
    assert before == machine.wall_s
    machine.wall_s += jump_s
    machine.wait(5.0)
    assert clock() - before == 5.0


@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S, 0.0])
def test_deadlines_and_ends_keep_their_distance_over_a_restart(tmp_path: Path, jump_s: float) -> None:
    machine = Machine()
    clock = machine.clock()
    journal = JournalFile(tmp_path, 1, origin=clock.origin)
    asked = request("open", deadline_unix_s=clock() + 600.0, opened_unix_s=clock())
    records: list[Record] = [Opened(asked), Opened(request("ended")), Finished("ended", clock())]
    journal.state.apply_all(records)
    journal.append(records)
    journal.close()
    machine.wall_s += jump_s
    machine.wait(5.0)
    for _ in range(2):  # what was translated once is not translated again
        clock = machine.clock()
        journal = JournalFile(tmp_path, 2, origin=clock.origin)
        journal.close()
    entries = journal.state.entries
    assert entries["open"].request.deadline_unix_s - clock() == pytest.approx(595.0)
    assert entries["open"].request.opened_unix_s - clock() == pytest.approx(-5.0)
    assert entries["ended"].finished is not None
    assert entries["ended"].finished.finished_unix_s - clock() == pytest.approx(-5.0)


def test_across_boots_the_machines_clock_is_all_there_is(tmp_path: Path) -> None:
    journal = JournalFile(tmp_path, 1, origin=Machine().clock("one").origin)
    journal.state.apply(Opened(request()))
    journal.append([Opened(request())])
    journal.close()
    for boot_id in ("two", ""):
        journal = JournalFile(tmp_path, 2, origin=Machine(monotonic_s=1.0).clock(boot_id).origin)
        journal.close()
        assert journal.state.entries["r"].request == request()


def test_counts_without_a_boot_are_not_compared() -> None:
    assert ClockOrigin("", 9.0).seconds_after(ClockOrigin("", 4.0)) == 0.0
    assert ClockOrigin("a", 9.0).seconds_after(None) == 0.0
    assert ClockOrigin("a", 9.0).seconds_after(ClockOrigin("a", 4.0)) == 5.0


def test_a_stream_outlives_a_clock_that_is_set_while_its_coordinator_is_replaced(tmp_path: Path) -> None:
    """By the machine's clock its deadline has passed, and the resume window of an ended one, too."""
    machine = Machine()
    clock = machine.clock()
    journal = JournalFile(tmp_path, 1, origin=clock.origin)
    records: list[Record] = [
        Opened(request("open", deadline_unix_s=clock() + 600.0, opened_unix_s=clock())),
        Opened(request("ended", deadline_unix_s=clock() + 600.0)),
        Finished("ended", clock(), (), "CANCELLED", "the request was cancelled"),
    ]
    journal.state.apply_all(records)
    journal.append(records)
    journal.close()
    machine.wall_s += HOUR_S
    clock = machine.clock()
    journal = JournalFile(tmp_path, 2, origin=clock.origin)
    shell = Shell(journal.state, term=2, now=clock())
    shell.open()
    journal.close()
    assert not shell.records and set(journal.state.entries) == {"open", "ended"}
