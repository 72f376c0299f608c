"""LocalNodes: Ray nodes on this machine for LocalCluster, found by their command lines, started, and killed.

In a test's process. A raylet's command line tells its node's id, address and Ray, so nothing of Ray is imported. A node
that ends by itself, because its Ray is gone, is started again, as the service of a machine would do.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from echelon.internal.processes import Process, descendants, kill_all, processes, session_members

POLL_S = 0.2
RESTART_S = 1.0
OBJECT_STORE_BYTES = 80_000_000  # about Ray's smallest
RAYLET = "raylet"
AGENT_TITLE = "ray::AgentActor"
ENVIRONMENT = ("RAY_AUTH_MODE=disabled", "RAY_worker_niceness=0", "PYTHONUNBUFFERED=1")


@dataclass(frozen=True, slots=True)
class Node:
    """One Ray node. state: alive or dead; agent_pid: of its node agent, 0 for none. The head also runs Ray's GCS."""

    node_id: str
    address: str
    state: str
    head: bool
    raylet_pid: int
    agent_pid: int


class LocalNodes:
    """The nodes of one cluster on this machine. cpus: of each node that is ours to start, beside Ray's head.

    ray_address is None where the process `supervisor` starts the head. folder takes the nodes' logs.
    """

    def __init__(self, supervisor: int, ray_address: str | None, folder: Path, cpus: Sequence[int]) -> None:
        self._supervisor = supervisor
        self._ray_address = ray_address
        self._folder = folder
        self._lock = threading.Lock()
        self._wanted = dict(enumerate(cpus, start=1))
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._started_s: dict[int, float] = {}
        self._seen: dict[str, Node] = {}
        self._closed = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="ray-nodes", daemon=True)
        self._keeper.start()

    def nodes(self) -> tuple[Node, ...]:
        """All there are, the head first, and those that were seen alive and are not."""
        table = processes()
        address = self._address(table)
        found = [_node(raylet, arguments, table) for raylet, arguments in _raylets(table.values(), address)]
        alive = {node.node_id: node for node in found}
        with self._lock:
            dead = {node_id: dataclasses.replace(node, state="dead") for node_id, node in self._seen.items()}
            self._seen = dead | alive
            return tuple(sorted(self._seen.values(), key=lambda node: (not node.head, node.address, node.node_id)))

    def add(self, cpus: int) -> None:
        """One more node, which joins in a few seconds."""
        with self._lock:
            self._wanted[max(self._wanted, default=0) + 1] = cpus

    def kill(self, node: Node) -> list[int]:
        """SIGKILL to the raylet and all that runs under it, as when a machine dies; returns the pids once all are gone.

        Of the head the GCS is left. A node of ours does not come back.
        """
        table = processes()
        if node.raylet_pid not in table:
            return []
        victims = {node.raylet_pid, *(process.pid for process in descendants(node.raylet_pid, table))}
        with self._lock:
            for number, running in list(self._running.items()):
                if table[node.raylet_pid].session == running.pid:
                    del self._wanted[number], self._running[number]
                    victims |= set(session_members(running.pid))
                    kill_all(victims)
                    running.wait()
        kill_all(victims)
        return sorted(victims)

    def close(self) -> None:
        """End the nodes that are ours."""
        self._closed.set()
        self._keeper.join()
        for running in self._running.values():
            kill_all(session_members(running.pid))
            running.wait()

    def _keep(self) -> None:
        """Until closed: a node that is wanted runs, once there is a Ray to join."""
        while not self._closed.wait(POLL_S):
            with self._lock:
                ended = {n for n in self._wanted if n not in self._running or self._running[n].poll() is not None}
                due = {n for n in ended if time.monotonic() - self._started_s.get(n, 0.0) >= RESTART_S}
                if due and (address := self._address(processes())):
                    for number in due:
                        self._start(number, address)

    def _start(self, number: int, address: str) -> None:
        if earlier := self._running.get(number):
            kill_all(session_members(earlier.pid))
        self._started_s[number] = time.monotonic()
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={address}"]
        ports = ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        size = [f"--num-cpus={self._wanted[number]}", "--num-gpus=0", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        own = [f"--node-ip-address=127.0.0.{number + 1}", "--include-log-monitor=false", "--disable-usage-stats"]
        with (self._folder / f"node{number}.log").open("ab") as log:
            self._running[number] = subprocess.Popen(
                ["env", *ENVIRONMENT, *ray, *ports, *size, *own],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                start_new_session=True,
            )

    def _address(self, table: Mapping[int, Process]) -> str:
        """Of the Ray that these nodes join; empty while there is none."""
        if self._ray_address is not None:
            return self._ray_address
        own = {process.pid: process for process in descendants(self._supervisor, table)}
        return next((_option(arguments, "--gcs-address") for _, arguments in _raylets(own.values(), None)), "")


def cpus_of(nodes: int | Sequence[int], flags: Mapping[str, object]) -> list[int]:
    """Of each node, the head first: as told, or room on each for all ranks of these flags."""
    if not isinstance(nodes, int):
        return list(nodes)
    ranks = math.prod(int(str(flags.get(name) or 1)) for name in ("tensor", "pipeline", "data", "replicas"))
    return [ranks] * nodes


def with_cpus(cpus: int, command: list[str]) -> list[str]:
    """A command whose Ray head has so many CPUs."""
    return ["env", f"RAY_OVERRIDE_RESOURCES={json.dumps({'CPU': cpus})}", *command]


def _raylets(table: Iterable[Process], address: str | None) -> list[tuple[Process, list[str]]]:
    """Those of one Ray, or of any, with their arguments."""
    named = [(process, process.arguments()) for process in table if process.name == RAYLET]
    return [each for each in named if address is None or f"--gcs-address={address}" in each[1]]


def _node(raylet: Process, arguments: list[str], table: Mapping[int, Process]) -> Node:
    under = (process for process in table.values() if process.parent == raylet.pid)
    agent = next((process.pid for process in under if process.arguments()[:1] and _is_agent(process)), 0)
    return Node(
        node_id=_option(arguments, "--node_id"),
        address=_option(arguments, "--node_ip_address"),
        state="alive",
        head="--head" in arguments,
        raylet_pid=raylet.pid,
        agent_pid=agent,
    )


def _is_agent(process: Process) -> bool:
    return process.arguments()[0].startswith(AGENT_TITLE)


def _option(arguments: Iterable[str], name: str) -> str:
    return next((word.partition("=")[2] for word in arguments if word.startswith(f"{name}=")), "")
