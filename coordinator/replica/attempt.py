"""One attempt at an epoch: its ranks, what was heard of them, and what they are told on the way to serving.

Mutable state of `coordinator/replica/core.py`, which decides when an attempt begins, when it serves and when it ends.
Pure: knows no clock and no transport.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from coordinator.placement import RankMemory, ReplicaPlan
from coordinator.replica import health
from coordinator.replica.events import (
    Accept,
    Attached,
    Beat,
    Command,
    Effect,
    Form,
    OpenStore,
    Refuse,
    Resident,
    Retire,
    Tell,
)
from coordinator.replica.health import HealthLimits, Observation
from echelon.internal.link import Fence
from echelon.types import Rank

MAX_BACKOFF_S = 5.0
FAULT_S = 1.0  # for a death to be heard of that explains a fault: who waits for a dead rank fails at once


class State(enum.Enum):
    """fencing: processes are being killed. waiting: for the next attempt. launching: until all ranks have attached.

    retiring: ranks end their epoch by themselves, and the next one is not on disk yet.
    """

    STARTING = "starting"
    ADOPTING = "adopting"
    RETIRING = "retiring"
    FENCING = "fencing"
    WAITING = "waiting"
    LAUNCHING = "launching"
    FORMING = "forming"
    READY = "ready"
    FAILED = "failed"


@dataclass(slots=True)
class RankState:
    """One incarnation of a rank; hello is None until it first attaches, resident until it serves.

    retiring_s: when it was told to end its epoch, None once it has said that it did.
    """

    incarnation: str
    seen: Observation
    hello: Attached | None = None
    loaded_bytes: int = 0
    total_bytes: int = 0
    resident: Resident | None = None
    retiring_s: float | None = None

    @property
    def idle(self) -> bool:
        """Attached, and free to form an epoch."""
        return self.hello is not None and self.retiring_s is None

    def heard(self, now: float, phase: str, step: int, loaded_bytes: int) -> None:
        """A message came; it counts as progress if anything in it is new."""
        moved = (phase, step, loaded_bytes) != (self.seen.phase, self.seen.step, self.loaded_bytes)
        self.seen = Observation(phase, step, now, now if moved else self.seen.moved_s, self.seen.detached_s)
        self.loaded_bytes = loaded_bytes

    def beat(self, now: float, beat: Beat) -> None:
        """A heartbeat came."""
        self.heard(now, beat.phase, beat.step, self.loaded_bytes)
        self.seen = self.seen.in_step(beat.kind, beat.slowest_s)

    def detached(self, now: float) -> None:
        """Its stream ended; a new hello replaces the observation."""
        self.seen = Observation(self.seen.phase, self.seen.step, self.seen.heard_s, self.seen.moved_s, now)

    def retired(self, now: float, hello: Attached) -> None:
        """It holds nothing any more; hello as if it had just been started."""
        self.hello, self.resident, self.retiring_s = hello, None, None
        self.loaded_bytes = self.total_bytes = 0
        self.seen = Observation("waiting", 0, now, now)


@dataclass(slots=True)
class Attempt:
    """deadline_s ends adopting and launching; while fencing and waiting it is the earliest time to launch.

    surplus: ranks of an earlier, larger layout, which wait to be of use again. fault: the first that a rank told while
    forming, (when, rank, reason); others follow from it.
    """

    fence: Fence
    plan: ReplicaPlan
    deadline_s: float
    began_s: float
    ranks: dict[int, RankState] = field(default_factory=dict)
    surplus: dict[int, RankState] = field(default_factory=dict)
    store_address: str = ""
    kv_blocks: int = 0
    fault: tuple[float, int, str] | None = None

    @property
    def everyone(self) -> Mapping[int, RankState]:
        return self.ranks | self.surplus

    @property
    def all_idle(self) -> bool:
        """What is surplus too: it must have let go of its memory."""
        return all(rank.idle for rank in self.everyone.values())

    @property
    def all_ready(self) -> bool:
        return all(rank.hello and rank.resident for rank in self.ranks.values())

    @property
    def absent(self) -> list[int]:
        """Ranks of the layout that have no process."""
        return [index for index in self.plan.ranks if index not in self.ranks]

    def add(self, index: int, rank: RankState) -> None:
        """A process in a slot; one that the layout does not need is surplus."""
        (self.ranks if index in self.plan.ranks else self.surplus)[index] = rank

    def find(self, index: int, incarnation: str) -> RankState | None:
        """The rank, unless another process is in its slot."""
        rank = self.everyone.get(index)
        return rank if rank is not None and rank.incarnation == incarnation else None

    def first_unfit(self, now: float, limits: HealthLimits) -> tuple[int, str] | None:
        """A rank that is dead, wedged or faulty as far as can be heard, and why."""
        if self.fault is not None and now - self.fault[0] >= FAULT_S:
            return self.fault[1:]
        attached = {index: rank.seen for index, rank in self.everyone.items() if rank.hello}
        if unfit := health.first_unfit(now, attached, limits):
            return unfit
        for index, rank in self.everyone.items():
            if rank.retiring_s is not None and now - rank.retiring_s >= limits.retire_s:
                return index, f"did not end its epoch within {limits.retire_s:g} s"
        return None

    def told_fault(self, now: float, index: int, reason: str) -> list[Effect]:
        """While forming; the first counts, unless a death explains it. Nobody is told yet."""
        self.fault = self.fault or (now, index, reason)
        return []

    def first_absent(self) -> int:
        """A rank that was expected and has not attached."""
        return next(index for index, rank in self.ranks.items() if not rank.hello)

    def discard(self, index: int, reason: str) -> list[Tell]:
        """A rank that has no part goes without harm; empty for one that has."""
        if index not in self.surplus or self.surplus[index].retiring_s is not None:
            return []
        told = [self._tell(index, Refuse(reason))]
        del self.surplus[index]
        return told

    # What ranks are told.

    def accept(self, event: Attached) -> Tell:
        return Tell(self.fence, event.rank, event.incarnation, Accept())

    def refuse(self, stranger: Attached) -> Tell:
        reason = f"incarnation {stranger.incarnation} is not of epoch {self.fence.epoch}"
        return Tell(self.fence, stranger.rank, stranger.incarnation, Refuse(reason))

    def retire(self, index: int) -> Tell:
        return self._tell(index, Retire())

    def open_store(self) -> Tell:
        return self._tell(0, OpenStore())

    def form(self, store_address: str) -> list[Tell]:
        """Told to all. Raises ConfigError when there is no memory for the cache."""
        hellos = [rank.hello for rank in self.ranks.values() if rank.hello]
        self.kv_blocks = self.plan.kv_blocks([RankMemory(hello.node_id, hello.memory_bytes) for hello in hellos])
        self.store_address = store_address
        return [self._tell(index, Form(store_address, self.kv_blocks)) for index in self.ranks]

    def again(self, event: Attached) -> list[Tell]:
        """A rank that attached again and has not done what it was told may have missed it."""
        rank = self.everyone[event.rank]
        if rank.retiring_s is not None:
            return [self.retire(event.rank)]
        if event.rank in self.surplus or event.phase not in ("waiting", "store"):
            return []
        if self.store_address:
            return [self._tell(event.rank, Form(self.store_address, self.kv_blocks))]
        return [self.open_store()] if event.rank == 0 else []

    def _tell(self, index: int, command: Command) -> Tell:
        return Tell(self.fence, index, self.everyone[index].incarnation, command)

    # What it has come to.

    def loading(self) -> tuple[int, int] | None:
        """Bytes loaded and to load by all ranks, once each has told."""
        ranks = self.ranks.values()
        if not all(rank.total_bytes for rank in ranks):
            return None
        return sum(rank.loaded_bytes for rank in ranks), sum(rank.total_bytes for rank in ranks)

    def count_blocks(self) -> None:
        """Ranks settle the last of it, and those that were adopted all of it: read off what the leader holds."""
        leader = self.ranks[0].resident
        assert leader is not None, "only ranks that serve hold blocks"
        self.kv_blocks = leader.kv_bytes // self.plan.block_bytes[0]

    def describe(self) -> tuple[Rank, ...]:
        """The ranks of the layout that have attached, as GetCluster tells them."""
        ranks = sorted(self.ranks.items())
        return tuple(self._describe(index, rank, rank.hello) for index, rank in ranks if rank.hello)

    def _describe(self, index: int, rank: RankState, hello: Attached) -> Rank:
        resident, place = rank.resident or Resident(0, 0), self.plan.degrees.place(index)
        return Rank(
            replica=self.fence.replica,
            pipeline=place.pipeline_rank,
            data=place.data_rank,
            tensor=place.tensor_rank,
            expert=place.expert_rank,
            leader=index == 0,
            pid=hello.pid,
            node_id=hello.node_id,
            epoch=self.fence.epoch,
            state=rank.seen.phase if rank.seen.detached_s is None else "detached",
            device=hello.device,
            parameter_bytes=resident.parameter_bytes,
            kv_bytes=resident.kv_bytes,
            planned_parameter_bytes=self.plan.parameter_bytes[index],
            planned_kv_bytes=self.plan.block_bytes[index] * self.kv_blocks,
        )


def backoff_s(failures: int) -> float:
    """No wait after the first failure, then 1, 2, 4 s and so on: a replica that keeps dying must not spin."""
    return 0.0 if failures < 2 else min(2.0 ** (failures - 2), MAX_BACKOFF_S)
