"""LocalNodes, over processes that look like Ray's: found by their command lines, and killed with all under them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from echelon.internal.local_nodes import LocalNodes, cpus_of, with_cpus
from echelon.internal.processes import processes

# The supervisor starts raylets, each with a worker and an agent; all sleep under names of Ray's programs.
ACTOR = "import time; time.sleep(600)"
RAYLET = """
import subprocess, sys, time
for title in ("ray::IDLE", "ray::AgentActor"):
    subprocess.Popen([title, "-c", sys.argv[1]], executable=sys.executable)
open("/proc/self/comm", "w").write("raylet")
time.sleep(600)
"""
SUPERVISOR = """
import json, subprocess, sys, time
for arguments in json.loads(sys.argv[1]):
    subprocess.Popen([sys.executable, "-c", *arguments])
time.sleep(600)
"""


def raylet(number: int, port: int, *more: str) -> list[str]:
    told = [f"--node_id=id{number}", f"--node_ip_address=127.0.0.{number}", f"--gcs-address=127.0.0.1:{port}", *more]
    return [RAYLET, ACTOR, *told]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[LocalNodes]:
    started = [raylet(1, 7, "--head"), raylet(2, 7), raylet(3, 8)]
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISOR, json.dumps(started)], start_new_session=True)
    found = LocalNodes(supervisor.pid, "127.0.0.1:7", tmp_path, ())
    try:
        yield found
    finally:
        found.close()
        for process in processes().values():
            if process.session == supervisor.pid:
                os.kill(process.pid, 9)
        supervisor.wait()


def settled(nodes: LocalNodes) -> None:
    while sum(node.agent_pid > 0 for node in nodes.nodes()) < 2:
        time.sleep(0.02)


def test_nodes_of_one_ray_are_found_and_die_with_all_that_runs_there(nodes: LocalNodes) -> None:
    settled(nodes)
    head, other = nodes.nodes()
    assert (head.node_id, head.address, head.state, head.head) == ("id1", "127.0.0.1", "alive", True)
    assert (other.node_id, other.address, other.state, other.head) == ("id2", "127.0.0.2", "alive", False)
    gone = nodes.kill(other)
    assert len(gone) == 3 and {other.raylet_pid, other.agent_pid} < set(gone)
    assert not set(gone) & processes().keys()
    assert [node.state for node in nodes.nodes()] == ["alive", "dead"]
    assert nodes.nodes()[0] == head, "the other node is untouched"
    assert nodes.kill(other) == [], "the dead are not killed twice"


def test_each_node_has_room_for_all_ranks_unless_told_otherwise() -> None:
    assert cpus_of(3, {"tensor": 2, "pipeline": 2, "replicas": None}) == [4, 4, 4]
    assert cpus_of((0, 1, 1), {"tensor": 2}) == [0, 1, 1]
    assert with_cpus(0, ["serve"]) == ["env", 'RAY_OVERRIDE_RESOURCES={"CPU": 0}', "serve"]
