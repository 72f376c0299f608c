"""The two kinds of actors that Ray runs for a cluster: RankActor, a rank's process, and AgentActor, a node's agent.

Thin shells: Ray gives them a process, a node and a device, and nothing else goes through it. torch is imported only
once a rank starts, or a spare warms up. Both register with their node's agent first, and end when it does, so none is
ever without a master.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import ray

from worker.agent import NodeAgent, end_with
from worker.spec import RankSpec

LEASE_CHECK_S = 0.5
WARM_NICENESS = 10


class RankActor:
    """One device's process. Its actor only starts it: the rank itself dials the coordinator."""

    def __init__(self) -> None:
        self._spare_name = ""
        self._warming: threading.Thread | None = None
        self._holder: Any = None  # worker.checkpoint.held.Holder, whose module imports torch

    def node_id(self) -> str:
        """Where Ray has put it."""
        return str(ray.get_runtime_context().get_node_id())

    def warm(self, name: str, device: str, agent: Any) -> int:
        """Be a spare: register, then get ready beside those who work. Returns the pid."""
        end_with(ray.get(agent.register.remote(name, os.getpid())))
        self._spare_name = name
        self._warming = threading.Thread(target=_warm, args=(device,), name="warm", daemon=True)
        self._warming.start()
        return os.getpid()

    def spare(self, shard: str) -> tuple[int, bool]:
        """(pid, whether it is warm). shard: a folder that it is to hold ready for its device, empty for none."""
        assert self._warming is not None, "asked of one that is no spare"
        warm = not self._warming.is_alive()
        if warm and shard:
            from worker.checkpoint.held import Holder

            self._holder = self._holder or Holder(WARM_NICENESS)
            self._holder.want(Path(shard))
        return os.getpid(), warm

    def start(self, spec_json: str, agent: Any) -> int:
        """Register with the node's agent, then run the rank in a thread; the process ends with it. Returns the pid."""
        spec = dataclasses.replace(RankSpec.from_json(spec_json), node_id=self.node_id(), pid=os.getpid())
        if self._spare_name:
            ray.get(agent.rename.remote(self._spare_name, spec.name))
        else:
            end_with(ray.get(agent.register.remote(spec.name, spec.pid)))
        held = None if self._holder is None else self._holder.give()
        threading.Thread(target=_run_rank, args=(spec, held), name="rank", daemon=True).start()
        return spec.pid


def _warm(device: str) -> None:
    """Niced by itself: the threads that a rank starts later are not. Who cannot get ready is no spare."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WARM_NICENESS)
    try:
        from worker.warm import warm

        warm(device)
    except Exception:  # noqa: BLE001 - the agent tells its end, Ray's log of this process why
        traceback.print_exc()
        os._exit(1)


def _run_rank(spec: RankSpec, held: Any) -> None:
    """Whatever way a rank ends, its process ends too: Ray must not keep an empty actor in the slot."""
    try:
        from worker.rank import main  # torch comes in here, not in the agent and not before the rank is registered

        main(spec, held)
    finally:
        os._exit(1)


class AgentActor:
    """Serves a NodeAgent. When the coordinator's lease ends it kills its ranks, frees their slots and ends itself."""

    def __init__(self, cluster: str, lease_s: float) -> None:
        self._cluster = cluster
        self._agent = NodeAgent(lease_s)
        threading.Thread(target=self._watch_lease, name="lease", daemon=True).start()

    def register(self, name: str, pid: int) -> int:
        """See NodeAgent. Returns the agent's pid."""
        self._agent.register(name, pid)
        return os.getpid()

    def rename(self, name: str, new_name: str) -> None:
        """See NodeAgent."""
        self._agent.rename(name, new_name)

    def living(self) -> list[str]:
        """See NodeAgent."""
        return self._agent.living()

    def kill(self, term: int, prefix: str, first: str) -> list[str] | None:
        """See NodeAgent. None: a later coordinator gives the orders here."""
        return self._agent.kill(prefix, first) if self._agent.obeys(term) else None

    def deaths(self, timeout_s: float) -> list[str]:
        """See NodeAgent."""
        return self._agent.deaths(timeout_s)

    def renew(self, term: int, lease_s: float) -> bool:
        """See NodeAgent. False: a later coordinator gives the orders here."""
        if obeys := self._agent.obeys(term):
            self._agent.renew(lease_s)
        return obeys

    def _watch_lease(self) -> None:
        while not self._agent.expired():
            time.sleep(LEASE_CHECK_S)
        try:
            self._agent.kill(prefix="")
            remove_slots(self._cluster)
        finally:
            os._exit(0)


def slot_name(cluster: str, replica: int, rank: int) -> str:
    """Name of the placement group that keeps a device, through all epochs of the rank that has it."""
    return f"slot/{cluster}/{replica}/{rank}"


def parse_slot_name(cluster: str, name: str) -> tuple[int, int] | None:
    """The replica and rank of `slot_name`; None for what is no slot of the cluster."""
    kind, _, rest = name.partition("/")
    of, _, slot = rest.partition("/")
    replica, _, rank = slot.partition("/")
    return (int(replica), int(rank)) if (kind, of) == ("slot", cluster) else None


def remove_slots(cluster: str) -> None:
    """Give every device of the cluster back to Ray."""
    for group in ray.util.placement_group_table().values():
        if parse_slot_name(cluster, group["name"]) is not None and group["state"] != "REMOVED":
            ray.util.remove_placement_group(ray.util.get_placement_group(group["name"]))
