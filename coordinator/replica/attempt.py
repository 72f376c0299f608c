"""One attempt at an epoch: its ranks, what was heard of them, and what they are told on the way to serving.

Mutable state of `coordinator/replica/core.py`, which decides when an attempt begins, when it serves and when it ends.
Pure: knows no clock and no transport.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from coordinator.placement import RankMemory, ReplicaPlan
from coordinator.replica import health, recovery, told
from coordinator.replica.events import (
    Accept,
    Attached,
    Beat,
    Blame,
    Command,
    Effect,
    Emit,
    Fault,
    Form,
    OpenStore,
    Refuse,
    ReplicaDown,
    Resident,
    Retire,
    Tell,
)
from coordinator.replica.health import HealthLimits, Observation
from coordinator.replica.known import Known
from coordinator.replica.told import Told
from echelon.internal.link import Fence
from echelon.types import Rank


@dataclass(slots=True)
class RankState:
    """One incarnation of a rank; hello is None until it first attaches, resident until it serves.

    retiring_s: when it was told to end its epoch, None once it has said that it did. waits_for: why no node has a place
    for it, empty if one had.
    """

    incarnation: str
    seen: Observation
    hello: Attached | None = None
    loaded_bytes: int = 0
    total_bytes: int = 0
    resident: Resident | None = None
    retiring_s: float | None = None
    waits_for: str = ""

    @property
    def idle(self) -> bool:
        """Attached, and free to form an epoch."""
        return self.hello is not None and self.retiring_s is None

    def heard(self, now: float, phase: str, step: int, loaded_bytes: int) -> None:
        """A message came; it counts as progress if anything in it is new."""
        moved = (phase, step, loaded_bytes) != (self.seen.phase, self.seen.step, self.loaded_bytes)
        self.seen = Observation(phase, step, now, now if moved else self.seen.moved_s, self.seen.detached_s)
        self.loaded_bytes = loaded_bytes

    def beat(self, now: float, beat: Beat) -> list[Effect]:
        """A heartbeat came. Nothing follows from it alone."""
        self.heard(now, beat.phase, beat.step, self.loaded_bytes)
        self.seen = self.seen.in_step(beat.kind, beat.slowest_s)
        return []

    def detached(self, now: float) -> list[Effect]:
        """Its stream ended; a new hello replaces the observation. Nothing follows from it yet."""
        self.seen = replace(self.seen, detached_s=now)
        return []

    def retired(self, now: float, hello: Attached) -> None:
        """It holds nothing any more; hello as if it had just been started."""
        self.hello, self.resident, self.retiring_s = hello, None, None
        self.loaded_bytes = self.total_bytes = 0
        self.seen = Observation("waiting", 0, now, now)


@dataclass(slots=True)
class Attempt:
    """deadline_s ends adopting and launching; while fencing and waiting it is the earliest time to launch.

    surplus: ranks of an earlier, larger layout, which wait to be of use again. fault: the one that a rank told and that
    counts, held for a moment if something may still explain it. known: of an earlier epoch. formed: what all are told.
    """

    fence: Fence
    plan: ReplicaPlan
    deadline_s: float
    began_s: float
    ranks: dict[int, RankState] = field(default_factory=dict)
    surplus: dict[int, RankState] = field(default_factory=dict)
    known: Known | None = None
    formed: Form | None = None
    kv_blocks: int = 0
    fault: Told | None = None

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

    def first_unfit(self, now: float, limits: HealthLimits, due: bool) -> tuple[int, str] | None:
        """A rank that is dead, wedged or faulty as far as can be heard, and why. due: all must attach in time."""
        if self.fault is not None and now >= self.fault.until_s:
            return self.explained(self.fault.rank, self.fault.reason)
        attached = {index: rank.seen for index, rank in self.everyone.items() if rank.hello}
        if unfit := health.first_unfit(now, attached, limits):
            return unfit
        for index, rank in self.everyone.items():
            if rank.retiring_s is not None and now - rank.retiring_s >= limits.retire_s:
                return index, f"did not end its epoch within {limits.retire_s:g} s"
        if due and now >= self.deadline_s:
            return self.first_absent(), f"did not attach within {now - self.began_s:.0f} s"
        return None

    def later(self, lag_s: float) -> None:
        """Nobody listened for so long."""
        if lag_s > 0:
            for rank in self.everyone.values():
                rank.seen = rank.seen.later(lag_s)

    def take_fault(self, now: float, fault: Fault, forming: bool) -> list[Effect]:
        """A rank tells one. The leader is asked whose step it was, where the rank itself cannot know."""
        held, self.fault = self.fault, told.judge(now, fault, forming, self.fault)
        self.known = self.known if fault.of_peer else None  # it may be for want of memory
        if self.fault is held or self.fault.asks is None:
            return []
        return [self._tell(0, Blame(*self.fault.asks))]

    def take_blamed(self, now: float, requests: tuple[str, ...]) -> list[Effect]:
        """The leader has said whose step it was; nobody else is asked."""
        if self.fault is not None and self.fault.asks is not None:
            self.fault = replace(self.fault, until_s=now, requests=requests)
        return []

    def explained(self, index: int, reason: str) -> tuple[int, str]:
        """Which rank is at fault for what was found, and why: one that broke by itself, or one that cannot be heard."""
        fault = self.fault
        if fault is None:
            return index, reason
        if fault.step_broke:
            return fault.rank, fault.reason
        gone = [other for other, rank in self.ranks.items() if rank.seen.detached_s is not None]
        if fault.of_peer and (index, reason) == (fault.rank, fault.reason) and gone:
            return gone[0], f"its stream has ended, and rank {index} tells {reason}"
        return index, reason

    def wedged(self, now: float, index: int, limits: HealthLimits) -> bool:
        """A rank that is at fault can be heard, so its device may be why."""
        seen = self.everyone[index].seen
        return seen.detached_s is None and not health.unheard_s(now, seen, limits)

    def fault_of(self, now: float, index: int, reason: str, wedged: bool) -> recovery.Fault | None:
        """What is held against the device of the rank that is at fault; None: nothing."""
        fault = self.fault
        if fault is not None and (fault.rank, fault.reason) == (index, reason):
            return None if fault.of_peer else recovery.Fault(now, index, fault.step_broke)
        return recovery.Fault(now, index, True) if wedged else None

    def down(self, reason: str) -> ReplicaDown:
        """What is told of its end, once it has served."""
        if self.fault is None or not self.fault.step_broke:
            return ReplicaDown(self.fence, reason)
        return ReplicaDown(self.fence, reason, True, self.fault.requests)

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

    def refuse(self, stranger: Attached) -> list[Tell | Emit]:
        reason = f"incarnation {stranger.incarnation} is not of epoch {self.fence.epoch}"
        told = Emit("rank.refused", f"rank/{self.fence.replica}/{stranger.rank}", {"reason": reason})
        return [told, Tell(self.fence, stranger.rank, stranger.incarnation, Refuse(reason))]

    def retire(self, index: int) -> Tell:
        return self._tell(index, Retire())

    def open_store(self) -> Tell:
        return self._tell(0, OpenStore())

    def form(self, store_address: str) -> list[Tell]:
        """Told to all. Raises ConfigError when there is no memory for the cache."""
        hellos = [rank.hello for rank in self.ranks.values() if rank.hello]
        self.kv_blocks = self.plan.kv_blocks([RankMemory(hello.node_id, hello.memory_bytes) for hello in hellos])
        settled = self.known.on({hello.node_id for hello in hellos}) if self.known else None
        self.formed = Form(store_address, self.kv_blocks, settled)
        return [self._tell(index, self.formed) for index in self.ranks]

    def again(self, event: Attached) -> list[Tell]:
        """A rank that attached again and has not done what it was told may have missed it."""
        rank = self.everyone[event.rank]
        if rank.retiring_s is not None:
            return [self.retire(event.rank)]
        if event.rank in self.surplus or event.phase not in ("waiting", "store"):
            return []
        if self.formed:
            return [self._tell(event.rank, self.formed)]
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
        nodes = frozenset(rank.hello.node_id for rank in self.ranks.values() if rank.hello)
        self.known = Known(leader.settled, nodes) if leader.settled else None

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
