"""The nouns of batch jobs: a job as stored, what is written of it, and the runner's events and effects.

Frozen values without behaviour, between the runner (`jobs.py`), the database (`job_store.py`) and the shell that
connects them (`job_service.py`). Times are unix seconds; items are told by their index in the input.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.requests.nouns import Outcome as Outcome
from echelon.types import JobState, JobStatus


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredJob:
    """A job as the store holds it. done and interrupted are item indices; done is left empty once the job has ended."""

    status: JobStatus
    done: frozenset[int] = frozenset()
    interrupted: frozenset[int] = frozenset()
    last_cursor: int = 0


# What is to be written.


@dataclass(frozen=True, slots=True)
class StateChanged:
    """The job is in this state from unix_s on."""

    job_id: str
    state: JobState
    unix_s: float


@dataclass(frozen=True, slots=True)
class ItemRecorded:
    """An item's one result. Cursors rise by one within a job, in the order of writing."""

    job_id: str
    index: int
    cursor: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class ItemInterrupted:
    """A fault met this item while it ran."""

    job_id: str
    index: int


Write = StateChanged | ItemRecorded | ItemInterrupted


# What the runner is told.


@dataclass(frozen=True, slots=True)
class Loaded:
    """Jobs that the store holds: all of them at start, later each new one. Known ones are passed over."""

    jobs: tuple[StoredJob, ...]


@dataclass(frozen=True, slots=True)
class ItemEnded:
    """A started item came to its end. Told once for each StartItem and each CancelItem."""

    job_id: str
    index: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A replica fault sent this item back to be replayed."""

    job_id: str
    index: int


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """A user wants the job to end."""

    job_id: str


@dataclass(frozen=True, slots=True)
class Committed:
    """These writes are durable, in this order."""

    writes: tuple[Write, ...]


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = Loaded | ItemEnded | Interrupted | CancelRequested | Committed | Tick


# What the shell does, in this order.


@dataclass(frozen=True, slots=True)
class StartItem:
    """Submit this item and report its end."""

    job_id: str
    index: int


@dataclass(frozen=True, slots=True)
class CancelItem:
    """Cancel this item wherever it is, and report its end if it was started."""

    job_id: str
    index: int


@dataclass(frozen=True, slots=True)
class Persist:
    """Write this, after all earlier ones, and report it with Committed."""

    write: Write


@dataclass(frozen=True, slots=True)
class Wake:
    """Send a Tick at this time; replaces any earlier wish."""

    unix_s: float


@dataclass(frozen=True, slots=True)
class Changed:
    """The job's status is another now: tell its watchers."""

    job_id: str


Effect = StartItem | CancelItem | Persist | Wake | Changed
