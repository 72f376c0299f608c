"""The two kinds of actors that Ray runs for a cluster: RankActor, a rank's process, and AgentActor, a node's agent.

Thin shells: Ray gives them a process, a node and a device, and nothing else goes through it. torch is imported only
once a rank starts. A rank registers with its node's agent before it runs, so none is ever without a master.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from typing import Any

import ray

from worker.agent import NodeAgent
from worker.spec import RankSpec

LEASE_CHECK_S = 0.5


class RankActor:
    """One device's process. Its actor only starts it: the rank itself dials the coordinator."""

    def node_id(self) -> str:
        """Where Ray has put it."""
        return str(ray.get_runtime_context().get_node_id())

    def start(self, spec_json: str, agent: Any) -> int:
        """Register with the node's agent, then run the rank in a thread; the process ends with it. Returns the pid."""
        spec = dataclasses.replace(RankSpec.from_json(spec_json), node_id=self.node_id(), pid=os.getpid())
        ray.get(agent.register.remote(spec.name, spec.pid))
        threading.Thread(target=_run_rank, args=(spec,), name="rank", daemon=True).start()
        return spec.pid


def _run_rank(spec: RankSpec) -> None:
    """Whatever way a rank ends, its process ends too: Ray must not keep an empty actor in the slot."""
    try:
        from worker.rank import main  # torch comes in here, not in the agent and not before the rank is registered

        main(spec)
    finally:
        os._exit(1)


class AgentActor:
    """Serves a NodeAgent. When the coordinator's lease ends it kills its ranks, frees their slots and ends itself."""

    def __init__(self, cluster: str, lease_s: float) -> None:
        self._cluster = cluster
        self._agent = NodeAgent(lease_s)
        threading.Thread(target=self._watch_lease, name="lease", daemon=True).start()

    def register(self, name: str, pid: int) -> None:
        """See NodeAgent."""
        self._agent.register(name, pid)

    def living(self) -> list[str]:
        """See NodeAgent."""
        return self._agent.living()

    def kill(self, prefix: str, first: str) -> list[str]:
        """See NodeAgent."""
        return self._agent.kill(prefix, first)

    def deaths(self, timeout_s: float) -> list[str]:
        """See NodeAgent."""
        return self._agent.deaths(timeout_s)

    def renew(self, lease_s: float) -> None:
        """See NodeAgent."""
        self._agent.renew(lease_s)

    def _watch_lease(self) -> None:
        while not self._agent.expired():
            time.sleep(LEASE_CHECK_S)
        try:
            self._agent.kill(prefix="")
            remove_slots(self._cluster)
        finally:
            os._exit(0)


def slot_name(cluster: str, replica: int, rank: int) -> str:
    """Name of the placement group that keeps a rank's device through all its epochs."""
    return f"slot/{cluster}/{replica}/{rank}"


def remove_slots(cluster: str, replica: int | None = None) -> None:
    """Give every device of the cluster, or of one replica of it, back to Ray."""
    prefix = f"slot/{cluster}/" if replica is None else f"slot/{cluster}/{replica}/"
    for group in ray.util.placement_group_table().values():
        if group["name"].startswith(prefix) and group["state"] != "REMOVED":
            ray.util.remove_placement_group(ray.util.get_placement_group(group["name"]))
