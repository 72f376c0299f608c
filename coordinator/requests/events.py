"""What the coordinator's core hears and answers: the events and effects of `coordinator/requests/core.py`.

Frozen values without behaviour. The shell turns gRPC calls and link messages into events, and executes effects in
order: every `Append` of a step stands before its `Deliver`s and `Send`s, so one write() makes a step durable
before anyone hears of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from coordinator.journal.state import Record
from coordinator.requests.nouns import Received, Request, Shown
from echelon.internal.link import Command, Fence, ReplicaHello, Report

# What the core is told.


@dataclass(frozen=True, slots=True)
class Submit:
    """A stream asks for a request. received: the ids its client already holds, None when it holds none."""

    stream: int
    request: Request
    received: Received | None = None


@dataclass(frozen=True, slots=True)
class StreamClosed:
    """The client of this stream is gone. Ignored for a stream that has had its terminal event."""

    stream: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """End these requests; unknown and finished ones are left alone."""

    request_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LinkOpened:
    """A leader dialled and said what it can hold and what it holds. fence carries this coordinator's term."""

    fence: Fence
    hello: ReplicaHello


@dataclass(frozen=True, slots=True)
class LinkClosed:
    """The link broke; the replica may still be at work and dial again."""

    fence: Fence


@dataclass(frozen=True, slots=True)
class Reported:
    """A leader's report, the hello excepted."""

    report: Report


@dataclass(frozen=True, slots=True)
class ReplicaEnded:
    """This epoch of the replica is fenced: nothing of it will be heard again.

    step_broke: an error inside a step ended it. requests: those that were in the step, none where that is not known.
    """

    fence: Fence
    reason: str
    step_broke: bool = False
    requests: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Drain:
    """Refuse new requests from now on; those known go on."""


@dataclass(frozen=True, slots=True)
class ModelChanged:
    """Another model is served: ids and texts of the last one say nothing to it."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = Submit | StreamClosed | Cancel | LinkOpened | LinkClosed | Reported | ReplicaEnded | Drain | ModelChanged | Tick


# What the shell does, in this order.


@dataclass(frozen=True, slots=True)
class Append:
    """Write this record; all of a step's records go in one write()."""

    record: Record


@dataclass(frozen=True, slots=True)
class Deliver:
    """Queue this event for the stream. After the outcome the core knows the stream no more."""

    stream: int
    event: Shown


@dataclass(frozen=True, slots=True)
class Send:
    """Send this command on the open link of command.fence.replica; if it is not open any more, drop it."""

    command: Command


@dataclass(frozen=True, slots=True)
class Emit:
    """Something to tell in the event log and to count: kind is dotted, subject an id."""

    kind: str
    subject: str
    detail: Mapping[str, object] = field(default_factory=dict)


Effect = Append | Deliver | Send | Emit
