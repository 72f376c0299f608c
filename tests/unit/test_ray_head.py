"""RayHead: its failures carry the output of what failed, and nothing of it is left; and Cluster on one real Ray."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from coordinator.cluster import Cluster
from coordinator.supervisor import ray_head
from coordinator.supervisor.ray_head import STARTED_MARK, RayHead, RayHeadConfig, session_members
from echelon.errors import InternalError
from worker.spec import RankSpec, parse_rank_name


@dataclass(frozen=True, slots=True)
class Scripted(RayHeadConfig):
    """Runs Python code in Ray's place."""

    code: str = ""

    def command(self) -> list[str]:
        return [sys.executable, "-c", self.code]


def scripted(folder: Path, code: str) -> RayHead:
    return RayHead(Scripted("127.0.0.1", 1, 2, 2, folder, code))


def wait_up(head: RayHead) -> None:
    while not head.is_up():
        time.sleep(0.05)


def test_what_ends_while_starting_is_told_with_its_output_on_top(tmp_path: Path) -> None:
    head = scripted(tmp_path, "print('ports are taken'); raise SystemExit(3)")
    head.start(dict(os.environ))
    with pytest.raises(InternalError) as caught:
        wait_up(head)
    lines = str(caught.value).splitlines()
    assert lines[:2] == ["Ray does not start:", "ports are taken"] and "exit code 3" in lines[2]
    head.stop()


def test_what_does_not_come_up_in_time_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_head, "START_TIMEOUT_S", 0.5)
    head = scripted(tmp_path, "import time; print('still trying', flush=True); time.sleep(60)")
    head.start(dict(os.environ))
    try:
        with pytest.raises(InternalError, match=r"(?s)still trying.*not up within 0.5 s"):
            wait_up(head)
    finally:
        head.stop()


def test_stopping_leaves_nothing_of_the_session_even_what_ignores_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_head, "STOP_TIMEOUT_S", 0.2)
    code = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.fork() or os.setpgid(0, 0);"
        f"print({STARTED_MARK!r}, flush=True); time.sleep(600)"
    )
    head = scripted(tmp_path, code)
    head.start(dict(os.environ))
    wait_up(head)
    session = head.pid
    assert len(list(session_members(session))) == 2
    head.stop()
    head.stop()
    assert list(session_members(session)) == []


def test_an_end_is_noticed(tmp_path: Path) -> None:
    head = scripted(tmp_path, f"print({STARTED_MARK!r}, flush=True)")
    assert not head.ended()
    head.start(dict(os.environ))
    while not head.ended():
        time.sleep(0.05)
    head.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def real_ray() -> Iterator[RayHeadConfig]:
    with tempfile.TemporaryDirectory(prefix="echelon-ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        config = RayHeadConfig("127.0.0.1", free_port(), free_port(), num_cpus=3, folder=Path(folder))
        head = RayHead(config)
        head.start(dict(os.environ))
        try:
            wait_up(head)
            session = head.pid
            yield config
        finally:
            head.stop()
        assert list(session_members(session)) == []


@pytest.mark.cluster
def test_a_cluster_launches_finds_kills_and_removes_its_ranks(
    real_ray: RayHeadConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asyncio.run(live(real_ray.address))


async def live(address: str) -> None:
    def spec(rank: int, incarnation: str, replica: int = 0) -> RankSpec:
        return RankSpec(
            coordinator_address="127.0.0.1:1", cluster="c0ffee", replica=replica, rank=rank, incarnation=incarnation,
            device="cpu", heartbeat_s=0.5, term=1,
        )  # fmt: skip

    cluster = Cluster("c0ffee", address, lease_s=30.0)
    await cluster.connect()
    assert await cluster.survivors(0) == frozenset()
    first, second = await asyncio.gather(cluster.launch(spec(0, "1")), cluster.launch(spec(1, "1")))
    assert await cluster.survivors(0) == {(0, "1"), (1, "1")}

    deaths = cluster.deaths()
    os.kill(second, signal.SIGKILL)
    assert await asyncio.wait_for(anext(deaths), 30) == (0, 1, "1")
    await deaths.aclose()
    await cluster.disconnect()

    successor = Cluster("c0ffee", address, lease_s=30.0)
    await successor.connect()
    assert await successor.survivors(0) == {(0, "1")}
    await successor.kill(0, suspect=1)
    assert not alive(first)
    again = await successor.launch(spec(1, "2"))
    assert await successor.survivors(0) == {(1, "2")}
    for replica in (1, 2):  # the second finds room where the first was
        await successor.launch(spec(0, "1", replica))
        await successor.end_surplus(replica + 1)
        assert await successor.survivors(replica) == {(0, "1")}
        await successor.end_surplus(1)
        assert await successor.survivors(replica) == frozenset()
        assert await successor.survivors(0) == {(1, "2")}

    # An agent that dies takes nothing with it: the next renewal brings another, which sees what is launched from then.
    deaths = successor.deaths()
    waiting = asyncio.ensure_future(anext(deaths))
    await asyncio.sleep(0.5)
    os.kill(agent_pid(again), signal.SIGKILL)
    await asyncio.sleep(1.5)
    assert not waiting.done(), waiting.result()
    await successor.renew()
    other = await successor.launch(spec(0, "3"))
    os.kill(other, signal.SIGKILL)
    assert await asyncio.wait_for(waiting, 30) == (0, 0, "3")
    await deaths.aclose()
    await successor.remove()
    assert not alive(again)


def agent_pid(neighbour: int) -> int:
    """The agent that runs in the same session of Ray; Ray names a worker after its actor."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or not (entry / "cmdline").read_bytes().startswith(b"ray::AgentActor"):
            continue
        if os.getsid(int(entry.name)) == os.getsid(neighbour):
            return int(entry.name)
    raise AssertionError("no agent runs")


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_rank_names_read_back() -> None:
    spec = RankSpec(
        coordinator_address="a:1", cluster="c", replica=1, rank=2, incarnation="7", device="cpu", heartbeat_s=1, term=3
    )
    assert parse_rank_name(spec.name) == ("c", 1, 2, "7")
    assert RankSpec.from_json(spec.to_json()) == spec
