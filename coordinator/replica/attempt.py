"""What a replica's core remembers between events: the ranks of the current attempt at an epoch.

Plain mutable state of `coordinator/replica/core.py`; it decides nothing.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from coordinator.placement import ReplicaPlan
from coordinator.replica.events import Attached, Resident
from coordinator.replica.health import Observation
from echelon.internal.link import Fence
from echelon.types import Rank

MAX_BACKOFF_S = 5.0


class State(enum.Enum):
    """fencing: processes are being killed. waiting: for the next attempt. launching: until all ranks have attached."""

    STARTING = "starting"
    ADOPTING = "adopting"
    FENCING = "fencing"
    WAITING = "waiting"
    LAUNCHING = "launching"
    FORMING = "forming"
    READY = "ready"
    FAILED = "failed"


@dataclass(slots=True)
class RankState:
    """One incarnation of a rank; hello is None until it first attaches, resident until it serves."""

    incarnation: str
    seen: Observation
    hello: Attached | None = None
    loaded_bytes: int = 0
    total_bytes: int = 0
    resident: Resident | None = None

    def heard(self, now: float, phase: str, step: int, loaded_bytes: int) -> None:
        """A message came; it counts as progress if anything in it is new."""
        moved = (phase, step, loaded_bytes) != (self.seen.phase, self.seen.step, self.loaded_bytes)
        self.seen = Observation(phase, step, now, now if moved else self.seen.moved_s, self.seen.detached_s)
        self.loaded_bytes = loaded_bytes

    def detached(self, now: float) -> None:
        """Its stream ended; a new hello replaces the observation."""
        self.seen = Observation(self.seen.phase, self.seen.step, self.seen.heard_s, self.seen.moved_s, now)


@dataclass(slots=True)
class Attempt:
    """deadline_s ends adopting and launching; while fencing and waiting it is the earliest time to launch."""

    deadline_s: float
    began_s: float
    ranks: dict[int, RankState] = field(default_factory=dict)
    store_address: str = ""
    kv_blocks: int = 0

    def count_blocks(self, plan: ReplicaPlan) -> None:
        """Ranks settle the last of it, and those that were adopted all of it: read off what the leader holds."""
        leader = self.ranks[0].resident
        assert leader is not None, "only ranks that serve hold blocks"
        self.kv_blocks = leader.kv_bytes // plan.block_bytes[0]

    def describe(self, fence: Fence, plan: ReplicaPlan) -> tuple[Rank, ...]:
        """The ranks that have attached, as GetCluster tells them."""
        return tuple(
            self._describe(fence, plan, index, rank, rank.hello)
            for index, rank in sorted(self.ranks.items())
            if rank.hello
        )

    def _describe(self, fence: Fence, plan: ReplicaPlan, index: int, rank: RankState, hello: Attached) -> Rank:
        resident, place = rank.resident or Resident(0, 0), plan.degrees.place(index)
        return Rank(
            replica=fence.replica,
            pipeline=place.pipeline_rank,
            data=place.data_rank,
            tensor=place.tensor_rank,
            expert=place.expert_rank,
            leader=index == 0,
            pid=hello.pid,
            node_id=hello.node_id,
            epoch=fence.epoch,
            state=rank.seen.phase if rank.seen.detached_s is None else "detached",
            device=hello.device,
            parameter_bytes=resident.parameter_bytes,
            kv_bytes=resident.kv_bytes,
            planned_parameter_bytes=plan.parameter_bytes[index],
            planned_kv_bytes=plan.block_bytes[index] * self.kv_blocks,
        )


def backoff_s(failures: int) -> float:
    """No wait after the first failure, then 1, 2, 4 s and so on: a replica that keeps dying must not spin."""
    return 0.0 if failures < 2 else min(2.0 ** (failures - 2), MAX_BACKOFF_S)
