"""Devices: which slot each rank has, which slots are out, and what is to become of the devices held in reserve. Pure.

In the coordinator. A rank has the slot of its own number until it moves to a spare device; the slots of those are no
rank's own. What differs from that is on disk before a process starts by it, so that a successor finds each rank where
it is. Knows neither Ray nor processes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

RESERVE = -1  # in place of a replica: slots that are no rank's own

Slot = tuple[int, int]  # replica and rank; RESERVE and a number for a spare device


@dataclass(frozen=True, slots=True)
class Devices:
    """moved: of ranks that have another slot than their own, which. out: slots that are used no more, with their node.

    A slot that is out stays ours, so that its device is given to nobody.
    """

    moved: Mapping[Slot, Slot] = field(default_factory=dict)
    out: Mapping[Slot, str] = field(default_factory=dict)

    def slot_of(self, rank: Slot) -> Slot:
        """Where its processes run. rank: its replica and its number there."""
        return self.moved.get(rank, rank)

    def rank_of(self, slot: Slot) -> Slot | None:
        """Whose slot it is; None for a spare device that nobody has, and for one that was left or is out."""
        if slot[0] != RESERVE:
            return None if slot in self.moved else slot
        return next((rank for rank, has in self.moved.items() if has == slot), None)

    def replaced(self, rank: Slot, by: Slot, out_on: str = "") -> Devices:
        """The rank has another slot from now on. out_on: the node of what it had, if that is out; else it is left."""
        out = {**self.out, self.slot_of(rank): out_on} if out_on else self.out
        return Devices({**self.moved, rank: by}, out)

    def without_replica(self, replica: int) -> Devices:
        """As if none of its ranks had ever moved."""
        moved = {rank: slot for rank, slot in self.moved.items() if rank[0] != replica}
        return Devices(moved, {slot: node for slot, node in self.out.items() if slot[0] != replica})

    def forgotten(self, slot: Slot) -> Devices:
        """It is not out any more."""
        return replace(self, out={other: node for other, node in self.out.items() if other != slot})

    def free(self, found: Mapping[Slot, str]) -> dict[Slot, str]:
        """Spare devices that nobody has, of all slots that there are; with their nodes."""
        spare = {slot: node for slot, node in found.items() if slot[0] == RESERVE and slot not in self.out}
        return {slot: node for slot, node in spare.items() if self.rank_of(slot) is None}

    def to_json(self) -> dict[str, dict[str, str]]:
        """What `from_json` reads back."""
        moved = {_key(rank): _key(slot) for rank, slot in self.moved.items()}
        return {"moved": moved, "out": {_key(slot): node for slot, node in self.out.items()}}

    @classmethod
    def from_json(cls, content: Mapping[str, Mapping[str, str]]) -> Devices:
        """Raises ValueError."""
        moved = {_slot(rank): _slot(slot) for rank, slot in content.get("moved", {}).items()}
        return cls(moved, {_slot(slot): node for slot, node in content.get("out", {}).items()})


NONE_MOVED = Devices()


@dataclass(frozen=True, slots=True)
class Situation:
    """What there is to decide on. found: all slots that Ray has of ours, with their nodes, empty while it has none.

    wanted: spare devices that nobody has. lost: nodes without an agent. serving: all replicas do.
    """

    wanted: int
    devices: Devices
    found: Mapping[Slot, str]
    lost: Collection[str]
    serving: bool


@dataclass(frozen=True, slots=True)
class Hold:
    """Have one spare device more."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class Release:
    """The slot is of no use: Ray may have the device back."""

    slot: Slot


def choose(free: Mapping[Slot, str], lost: Collection[str], near: str = "") -> Slot | None:
    """The spare device for a rank, by preference on the node where its shard lies; None if no good one is left."""
    usable = [slot for slot, node in free.items() if node not in {"", *lost}]
    return min(usable, key=lambda slot: (free[slot] != near, slot), default=None)


def next_move(now: Situation) -> tuple[Hold | Release | None, str]:
    """What is of no use goes at any time; what is missing is sought while nobody else may need the room."""
    for slot, node in now.devices.out.items():
        if now.found.get(slot) != node:
            return Release(slot), "it is not on the device any more that was taken out"
    free = now.devices.free(now.found)
    for slot, node in now.found.items():
        if slot in free and node in {"", *now.lost}:
            return Release(slot), "its node is lost"
        if slot not in free and slot not in now.devices.out and now.devices.rank_of(slot) is None:
            return Release(slot), "its rank has another"
    if len(free) > now.wanted:
        return Release(max(free)), f"{now.wanted} are to be held"
    if len(free) == now.wanted:
        return None, "as many are held as are to be"
    if not now.serving:
        return None, "a replica does not serve: its ranks come first"
    taken = {*now.found, *now.devices.moved.values(), *now.devices.out}
    number = next(number for number in range(len(taken) + 1) if (RESERVE, number) not in taken)
    return Hold((RESERVE, number)), f"{len(free)} of {now.wanted} are held"


def slot_text(slot: Slot) -> str:
    """As the subject of an event tells it."""
    return f"device/{slot[1]}" if slot[0] == RESERVE else _key(slot)


def who(slot: Slot) -> str:
    """Whose slot it is or was, in a sentence."""
    return f"spare device {slot[1]}" if slot[0] == RESERVE else f"rank {slot[1]} of replica {slot[0]}"


def _key(slot: Slot) -> str:
    return f"{slot[0]}/{slot[1]}"


def _slot(key: str) -> Slot:
    replica, rank = key.split("/")
    return int(replica), int(rank)
