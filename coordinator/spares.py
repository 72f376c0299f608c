"""Spares: warm processes that wait in slots of ranks and on spare devices, so that an epoch need not import or warm up.

On the coordinator's loop. `next_move` decides, purely: which slots are to have a spare, and when one is started or
ended. The shell keeps the processes, hands one over when its rank is to be started, and starts another once the
replicas serve again. Who is no longer up to it is ended, and the rank starts cold: a spare is never waited for.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from coordinator.agents import unheard
from coordinator.cluster import Cluster, SpareProcess
from coordinator.devices import RESERVE, Slot, slot_text
from coordinator.events import EventLog
from echelon.errors import InternalError
from echelon.types import Spare
from worker.spec import RankSpec, spare_name

TICK_S = 0.5
SETTLED_S = 3.0  # after the replicas serve again: streams that were interrupted come first
ASK_S, ANSWER_S = 5.0, 10.0  # how often a warm one is asked whether it lives, and how long it may take to say so
HAND_OVER_S = 2.0
RETRY_S = 10.0


@dataclass(frozen=True, slots=True)
class Need:
    """What the coordinator tells. slots: as in `wanted_slots`; serving_s, queued: as in Situation.

    shard_of: the folder that a spare in this slot is to hold ready, empty for none. slot_of: that of a replica's rank.
    """

    slots: Sequence[tuple[Slot, str]]
    spares_per_node: int
    serving_s: float | None
    queued: int
    shard_of: Callable[[Slot], str]
    slot_of: Callable[[int, int], Slot]


@dataclass(frozen=True, slots=True)
class Situation:
    """What there is to decide on. serving_s: for how long all replicas have, None while one does not."""

    wanted: Sequence[Slot]
    held: Collection[Slot]
    warming: bool
    serving_s: float | None
    queued: int


@dataclass(frozen=True, slots=True)
class Start:
    """A spare for this slot."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class End:
    """The spare of this slot is of no use any more."""

    slot: Slot


def wanted_slots(slots: Sequence[tuple[Slot, str]], spares_per_node: int) -> list[Slot]:
    """The first so many slots of each node. slots: with their nodes; of ranks by replica and mesh, then the others."""
    taken: Counter[str] = Counter()
    wanted = []
    for slot, node_id in slots:
        if taken[node_id] < spares_per_node:
            taken[node_id] += 1
            wanted.append(slot)
    return wanted


def next_move(now: Situation) -> tuple[Start | End | None, str]:
    """One at a time, and only while nobody waits: what starts takes the processor from those who work."""
    if now.serving_s is None:
        return None, "a replica does not serve"
    for slot in now.held:
        if slot not in now.wanted:
            return End(slot), "its slot is to have none"
    if now.warming:
        return None, "another is getting warm"
    missing = [slot for slot in now.wanted if slot not in now.held]
    if not missing:
        return None, "every slot has what it is to have"
    if now.serving_s < SETTLED_S:
        return None, f"replicas serve for {now.serving_s:.1f} s, {SETTLED_S:g} s are for what was interrupted"
    if now.queued:
        return None, f"{now.queued} requests wait"
    return Start(missing[0]), "its slot has none"


@dataclass(slots=True)
class _Held:
    process: SpareProcess
    pid: int
    warm: bool
    asked_s: float


class Spares:
    """name, term: of the coordinator's cluster and of itself; spares are called by them."""

    def __init__(
        self, cluster: Cluster, name: str, term: int, device: str, need: Callable[[], Need], events: EventLog
    ) -> None:
        self._cluster = cluster
        self._name = name
        self._term = term
        self._device = device
        self._need = need
        self._events = events
        self._held: dict[Slot, _Held] = {}
        self._serials = itertools.count(1)
        self._not_before_s = 0.0

    async def adopt(self) -> None:
        """Keep what a predecessor has left, one a slot, if it answers as soon as one that is to be a rank.

        Raises InternalError when Ray does not answer; can be done again then.
        """
        left = await self._cluster.spares()
        kept = {process.slot: process for process in left}
        for process in left:
            if process not in kept.values():
                await self._end_process(process.slot, process.name)
        now = time.monotonic()
        await asyncio.gather(*(self._ask(process, now, HAND_OVER_S) for process in kept.values()))

    async def run(self) -> None:
        """Have them, for as long as the coordinator lives."""
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            for held in list(self._held.values()):
                if now - held.asked_s >= (ASK_S if held.warm else TICK_S):
                    await self._ask(held.process, now)
            if now >= self._not_before_s:
                await self._move()

    def describe(self) -> tuple[Spare, ...]:
        """Each of them, for GetCluster."""
        return tuple(_describe(slot, held) for slot, held in sorted(self._held.items()))

    def died(self, replica: int, rank: int) -> None:
        """A node's agent saw one end."""
        if held := self._held.pop((replica, rank), None):
            self._lose((replica, rank), held.warm, "its process has died")

    async def on_node(self, kind: str, node_id: str) -> None:
        """An event of a node. Who waits on a lost one has no master; Ray, or the agent that comes next, ends it."""
        for slot, held in list(self._held.items()):
            if kind == "node.lost" and held.process.node_id == node_id:
                del self._held[slot]
                self._emit("spare.lost", slot, reason="its node is lost")
                await self._end_process(slot, held.process.name)

    async def start_rank(self, spec: RankSpec) -> bool:
        """Have the spare of its slot be this rank; False if there is none that is up to it."""
        slot = self._need().slot_of(spec.replica, spec.rank)
        held = self._held.get(slot)
        if held is None or not held.warm:
            return False
        del self._held[slot]
        # A launch may be given up meanwhile; one that does not answer must be ended all the same, or nobody would.
        handing = unheard(asyncio.ensure_future(self._cluster.start_spare(held.process, spec, HAND_OVER_S)))
        try:
            await asyncio.shield(handing)
        except InternalError as error:
            self._lose(slot, True, error.message)
            return False
        self._emit("spare.started", slot, pid=held.pid)
        return True

    async def _move(self) -> None:
        need = self._need()
        warming = not all(held.warm for held in self._held.values())
        wanted = wanted_slots(need.slots, need.spares_per_node)
        move, reason = next_move(Situation(wanted, tuple(self._held), warming, need.serving_s, need.queued))
        match move:
            case Start(slot):
                await self._start(slot)
            case End(slot):
                await self._end(slot, reason)
            case None:
                pass

    async def _start(self, slot: Slot) -> None:
        name = spare_name(self._name, *slot, f"{self._term}-{next(self._serials)}")
        try:
            process = await self._cluster.launch_spare(name, *slot, self._device)
        except InternalError as error:
            await self._end_process(slot, name)  # it may have begun all the same
            self._not_before_s = time.monotonic() + RETRY_S
            self._emit("spare.failed", slot, error=error.message)
            return
        await self._ask(process, time.monotonic())

    async def _ask(self, process: SpareProcess, now: float, timeout_s: float = ANSWER_S) -> None:
        slot = process.slot
        before = self._held.get(slot)
        try:
            shard = self._need().shard_of(slot)
            pid, warm = await self._cluster.ask(process.actor.spare, shard, timeout_s=timeout_s)
        except InternalError as error:
            if before is None or self._held.get(slot) is before:
                self._held.pop(slot, None)
                await self._end_process(slot, process.name)
                self._lose(slot, before is not None and before.warm, error.message)
            return
        if before is not None and self._held.get(slot) is not before:
            return  # it has become a rank meanwhile, or its death was told
        self._held[slot] = _Held(process, pid, warm, now)
        if before is None or before.warm != warm:
            self._emit(f"spare.{_state(warm)}", slot, pid=pid)

    async def _end(self, slot: Slot, reason: str) -> None:
        held = self._held.pop(slot)
        await self._end_process(slot, held.process.name)
        self._emit("spare.ended", slot, pid=held.pid, reason=reason)

    def _lose(self, slot: Slot, was_warm: bool, reason: str) -> None:
        """One that never got warm would hardly do so now: starting it takes a processor for seconds each time."""
        if not was_warm:
            self._not_before_s = time.monotonic() + RETRY_S
        self._emit("spare.lost", slot, reason=reason)

    async def _end_process(self, slot: Slot, name: str) -> None:
        """As far as it can be reached; what is left of it ends with its slot, or with its lease."""
        try:
            await self._cluster.end_all(name)
        except InternalError as error:
            self._emit("spare.not_ended", slot, error=error.message)

    def _emit(self, kind: str, slot: Slot, **detail: object) -> None:
        self._events.emit(kind, f"spare/{slot_text(slot)}", detail)


def _describe(slot: Slot, held: _Held) -> Spare:
    apart = slot[0] == RESERVE
    return Spare(
        replica=0 if apart else slot[0],
        rank=slot[1],
        pid=held.pid,
        node_id=held.process.node_id,
        state=_state(held.warm),
        on_spare_device=apart,
    )


def _state(warm: bool) -> str:
    return "warm" if warm else "warming"
