"""Reserve: the devices that are held beside the ranks' own, and ranks that move to one of them.

On the coordinator's loop, for `coordinator/places.py` and the coordinator's process; `coordinator/devices.py` decides.
A rank moves where its device is taken out or its node is lost. The move is on disk before anything follows from it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from coordinator import slots
from coordinator.agents import InThread, last_line
from coordinator.devices import NONE_MOVED, Devices, Hold, Release, Situation, Slot, choose, next_move, slot_text, who
from coordinator.fences import SupersededError
from coordinator.nodes import Nodes, Tell
from echelon.errors import ConfigError
from echelon.types import Rank, SpareDevice

TICK_S = 2.0
RETRY_S = 10.0  # until room is sought again where there was none

log = structlog.get_logger("reserve")


@dataclass(frozen=True, slots=True)
class Want:
    """What the coordinator tells. count: spare devices to hold. ranks: of all replicas. serving: all replicas do."""

    count: int
    ranks: int
    device: str
    serving: bool


class Reserve:
    """persist puts the devices on disk before it returns; it raises OSError, and SupersededError."""

    def __init__(
        self,
        cluster: str,
        nodes: Nodes[Any],
        in_thread: InThread,
        tell: Tell,
        devices: Devices,
        persist: Callable[[Devices], None],
    ) -> None:
        self._cluster = cluster
        self._nodes = nodes
        self._in_thread = in_thread
        self._tell = tell
        self._persist = persist
        self._not_before_s = 0.0
        self._lacking = ""
        self._found: dict[Slot, str] = {}  # all slots and their nodes, as last looked at
        self.devices = devices

    @property
    def free(self) -> dict[Slot, str]:
        """Spare devices that nobody has, with their nodes."""
        return self.devices.free(self._found)

    def slot_of(self, replica: int, rank: int) -> Slot:
        """Where that rank's processes run."""
        return self.devices.slot_of((replica, rank))

    def moved_of(self, replica: int) -> list[Slot]:
        """The spare devices that its ranks have."""
        return [slot for rank, slot in self.devices.moved.items() if rank[0] == replica]

    def slots(self, ranks: Sequence[Rank]) -> list[tuple[Slot, str]]:
        """Those of these ranks, which come in the order of the mesh, then the free ones; each with its node."""
        numbers: Counter[int] = Counter()
        taken = []
        for rank in ranks:
            taken.append((self.slot_of(rank.replica, numbers[rank.replica]), rank.node_id))
            numbers[rank.replica] += 1
        return taken + sorted(self.free.items())

    def describe(self) -> tuple[SpareDevice, ...]:
        """For GetCluster: those held for nobody yet, those that ranks have moved to, and those taken out."""
        free = [SpareDevice(slot=slot_text(slot), node_id=node, state="free") for slot, node in self.free.items()]
        used = [
            SpareDevice(slot=slot_text(slot), node_id=self._found.get(slot, ""), state="used", rank=slot_text(rank))
            for rank, slot in self.devices.moved.items()
        ]
        out = [SpareDevice(slot=slot_text(slot), node_id=node, state="out") for slot, node in self.devices.out.items()]
        return tuple(sorted([*free, *used, *out], key=lambda device: device.slot))

    async def check(self, want: Want) -> None:
        """Raises ConfigError if Ray has fewer devices than are wanted, and gets no more in time."""
        deadline_s = time.monotonic() + slots.SLOT_TIMEOUT_S
        need = want.ranks + want.count
        while want.count and (there := await self._in_thread(slots.devices_of_ray, want.device)) < need:
            if time.monotonic() >= deadline_s:
                unit = slots.resource_of(want.device)
                raise ConfigError(
                    f"spare-devices={want.count} beside {want.ranks} ranks: {want.ranks} + {want.count} = {need} "
                    f"{unit}s, and the nodes of Ray have {there}; lower spare-devices, or add a node",
                    field="spare_devices",
                )
            await asyncio.sleep(slots.SLOT_POLL_S)

    async def run(self, want: Callable[[], Want]) -> None:
        """Hold what is to be held, for as long as the coordinator lives. What fails is tried again."""
        while True:
            await asyncio.sleep(TICK_S)
            if not want().count and not self.free and self.devices == NONE_MOVED:
                continue  # nothing is asked of Ray for nothing
            try:
                await self.look()
                await self.tend(want())
            except SupersededError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever Ray or the disk says, no coordinator ends for it
                log.warning("spare devices are not looked after", error=last_line(error))

    async def adopt(self) -> None:
        """Know what a predecessor has held, as far as Ray tells; else it is found later."""
        try:
            await self.look()
        except Exception as error:  # noqa: BLE001 - whatever Ray says, ranks need no spare devices
            log.warning("spare devices are not known yet", error=last_line(error))

    async def look(self) -> None:
        """Which slots there are."""
        self._found = await self._in_thread(slots.find_slots, self._cluster)

    async def tend(self, want: Want) -> None:
        """One move."""
        now = Situation(want.count, self.devices, self._found, self._nodes.lost, want.serving)
        move, reason = next_move(now)
        match move:
            case Hold(slot) if time.monotonic() >= self._not_before_s:
                await self._hold(slot, want.device)
            case Release(slot):
                self._found.pop(slot, None)
                if slot in self.devices.out:
                    self._change(self.devices.forgotten(slot))
                await self._in_thread(slots.give_back, self._cluster, [slot])
                self._tell("device.released", slot_text(slot), {"reason": reason})

    def take(self, rank: Slot, reason: str, near: str = "", out_on: str = "") -> bool:
        """A spare device for a rank, by preference near what it had; False if there is none.

        out_on: the node of the slot that it had, if that is out and stays ours. Raises what persist does.
        """
        chosen = choose(self.free, self._nodes.lost, near)
        if chosen is None:
            return False
        had, node = self.devices.slot_of(rank), self._found[chosen]
        self._change(self.devices.replaced(rank, chosen, out_on))
        detail = {"had": slot_text(had), "has": slot_text(chosen), "node": node, "left": len(self.free)}
        self._tell("device.replaced", f"rank/{slot_text(rank)}", detail | {"reason": reason})
        return True

    async def replace(self, replica: int, rank: int) -> bool:
        """The device of this rank is taken out, if another can take its place. None of its processes may live."""
        slot, node = await self._in_thread(slots.find_slot, self._cluster, *self.slot_of(replica, rank))
        if slot is None or not node:
            return False
        return self.take((replica, rank), "the faults of its device are too many", near=node, out_on=node)

    async def leave(self, replica: int, rank: int, reason: str) -> bool:
        """Off a slot that is of no use; False if there is no other."""
        had = self.slot_of(replica, rank)
        if not self.take((replica, rank), reason):
            return False
        self._found.pop(had, None)
        await self._in_thread(slots.give_back, self._cluster, [had])
        return True

    async def give_back(self, replica: int) -> None:
        """The slots that its ranks have; those that are out stay."""
        found = await self._in_thread(slots.find_slots, self._cluster)
        ranks = {slot: self.devices.rank_of(slot) for slot in found}
        given = [slot for slot, rank in ranks.items() if rank is not None and rank[0] == replica]
        await self._in_thread(slots.give_back, self._cluster, given)

    def forget(self, replica: int) -> None:
        """A replica that is no more: what its ranks have moved to is free. Raises what persist does."""
        devices = self.devices.without_replica(replica)
        if devices != self.devices:
            self._change(devices)

    async def _hold(self, slot: Slot, device: str) -> None:
        group = await self._in_thread(slots.take_slot, self._cluster, *slot, device, self._nodes.lost)
        placed = await self._in_thread(group.wait, slots.SLOT_POLL_S)
        node = await self._in_thread(slots.node_of, group) if placed else ""
        if node:
            self._found[slot], self._lacking = node, ""
            self._tell("device.held", slot_text(slot), {"node": node})
            return
        await self._in_thread(slots.give_back, self._cluster, [slot])  # it must not wait in a rank's way
        self._not_before_s = time.monotonic() + RETRY_S
        lacking, self._lacking = self._lacking, slot_text(slot)
        if lacking != self._lacking:  # told once
            shortage = await self._in_thread(slots.shortage, who(slot), device)
            self._tell("device.no_room", slot_text(slot), {"reason": shortage})

    def _change(self, devices: Devices) -> None:
        self._persist(devices)
        self.devices = devices
