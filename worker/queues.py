"""Queues of the scheduler: sequences in their order, lowest first, and what must hold of them.

Lives in the leader; plain lists, changed in place by bisection. What is broken here is a defect and ends the epoch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence as Many
from operator import attrgetter

from worker.sequence import NO_SLOT, Sequence, State

ORDER = attrgetter("order")


def enqueue(queue: list[Sequence], sequence: Sequence) -> None:
    """Into its place."""
    insort(queue, sequence, key=ORDER)


def dequeue(queue: list[Sequence], sequence: Sequence) -> None:
    """It must be there."""
    del queue[bisect_left(queue, sequence.order, key=ORDER)]


def check_queue(queue: Many[Sequence], state: State, sequences: Many[Sequence]) -> None:
    """All sequences of this state are in the queue, in order, and no other."""
    expected = sorted((sequence for sequence in sequences if sequence.state is state), key=ORDER)
    assert list(queue) == expected, f"{state.name}: {len(queue)} queued, {len(expected)} held"


def check_slots(free: Many[int], sequences: Many[Sequence], max_running: int) -> None:
    """Every slot is free or held by one that runs."""
    held = [sequence.slot for sequence in sequences if sequence.state is State.RUNNING]
    assert sorted([*free, *held]) == list(range(max_running)), f"slots {sorted(free)} are free, {sorted(held)} held"
    assert all(sequence.slot == NO_SLOT for sequence in sequences if sequence.state is not State.RUNNING)
