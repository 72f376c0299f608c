"""Cluster on one real Ray: processes, agents and slots are launched, found again, killed and removed."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.cluster import Cluster
from coordinator.fences import SupersededError
from coordinator.supervisor.ray_head import RayHead, RayHeadConfig
from echelon.errors import InternalError
from echelon.internal.local_nodes import AGENT_TITLE
from echelon.internal.processes import alive, processes, session_members
from worker.spec import RankSpec, spare_name

pytestmark = [pytest.mark.cluster, pytest.mark.long]


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
            while not head.is_up():
                time.sleep(0.05)
            session = head.pid
            yield config
        finally:
            head.stop()
        assert session_members(session) == []


def test_a_cluster_launches_finds_kills_and_removes_its_ranks(
    real_ray: RayHeadConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asyncio.run(live(real_ray.address))


def spec(rank: int, incarnation: str, replica: int = 0) -> RankSpec:
    return RankSpec(
        coordinator_address="127.0.0.1:1", cluster="c0ffee", replica=replica, rank=rank, incarnation=incarnation,
        device="cpu", heartbeat_s=0.5, term=1,
    )  # fmt: skip


async def launch(cluster: Cluster, spec: RankSpec) -> int:
    return await cluster.launch(spec, await cluster.place(spec))


async def live(address: str) -> None:
    cluster = Cluster(("c0ffee", 1), address, lease_s=30.0)
    await cluster.connect()
    assert await cluster.survivors(0) == frozenset()
    first, second = await asyncio.gather(launch(cluster, spec(0, "1")), launch(cluster, spec(1, "1")))
    assert await cluster.survivors(0) == {(0, "1"), (1, "1")}

    deaths = cluster.deaths()
    os.kill(second, signal.SIGKILL)
    assert await asyncio.wait_for(anext(deaths), 30) == ("rank", 0, 1, "1")
    await deaths.aclose()
    left = await cluster.launch_spare(spare_name("c0ffee", 0, 1, "1"), 0, 1, "cpu")
    await cluster.disconnect()

    successor = Cluster(("c0ffee", 2), address, lease_s=30.0)
    await successor.connect()
    assert await successor.survivors(0) == {(0, "1")}
    assert [spare.name for spare in await successor.spares()] == [left.name]
    await successor.kill(0, suspect=1)
    assert not alive(first)
    neighbour = await a_spare_takes_over(successor)
    await what_is_surplus_goes(successor)
    await an_agent_that_dies_takes_its_ranks_with_it(successor, neighbour)
    last = await launch(successor, spec(0, "4"))
    await successor.disconnect()
    await one_that_was_superseded_ends_nothing(address)
    assert alive(last)
    again = Cluster(("c0ffee", 2), address, lease_s=30.0)
    await again.connect()
    assert await again.survivors(0) == {(0, "4")}
    await again.remove()
    assert not alive(last)


async def a_spare_takes_over(cluster: Cluster) -> int:
    """The pid of what is rank 1 then. One that is stopped is not waited for, and is gone."""
    (spare,) = await cluster.spares()
    pid, warm = await cluster.ask(spare.actor.spare, "")
    while not warm:
        _, warm = await cluster.ask(spare.actor.spare, "")
    await cluster.start_spare(spare, spec(1, "2"), timeout_s=10)
    assert await cluster.survivors(0) == {(1, "2")}
    assert await cluster.spares() == []

    stopped = await cluster.launch_spare(spare_name("c0ffee", 0, 0, "1"), 0, 0, "cpu")
    stopped_pid, _ = await cluster.ask(stopped.actor.spare, "")
    os.kill(stopped_pid, signal.SIGSTOP)
    with pytest.raises(InternalError, match="no answer in time"):
        await cluster.start_spare(stopped, spec(0, "2"), timeout_s=0.5)
    assert not alive(stopped_pid)
    return int(pid)


async def what_is_surplus_goes(cluster: Cluster) -> None:
    for replica in (1, 2):  # the second finds room where the first was
        await launch(cluster, spec(0, "1", replica))
        await cluster.end_surplus(replica + 1)
        assert await cluster.survivors(replica) == {(0, "1")}
        await cluster.launch_spare(spare_name("c0ffee", replica, 0, "1"), replica, 0, "cpu")
        await cluster.end_surplus(1)
        assert await cluster.survivors(replica) == frozenset()
        assert await cluster.spares() == []
        assert await cluster.survivors(0) == {(1, "2")}


async def an_agent_that_dies_takes_its_ranks_with_it(cluster: Cluster, neighbour: int) -> None:
    """Nobody else could end them for certain. The next renewal brings another, which sees what is launched then."""
    deaths = cluster.deaths()
    waiting = asyncio.ensure_future(anext(deaths))
    await asyncio.sleep(0.5)
    os.kill(agent_pid(neighbour), signal.SIGKILL)
    while alive(neighbour):
        await asyncio.sleep(0.05)
    await cluster.renew()
    assert not waiting.done(), waiting.result()
    other = await launch(cluster, spec(0, "3"))
    os.kill(other, signal.SIGKILL)
    assert await asyncio.wait_for(waiting, 30) == ("rank", 0, 0, "3")
    await deaths.aclose()
    await cluster.kill(0)


async def one_that_was_superseded_ends_nothing(address: str) -> None:
    """Agents obey the latest term that they have heard of."""
    earlier = Cluster(("c0ffee", 1), address, lease_s=30.0)
    await earlier.connect()
    with pytest.raises(SupersededError, match="a later coordinator than this one, of term 1"):
        await earlier.kill(0)
    await earlier.remove()


def agent_pid(neighbour: int) -> int:
    """The agent that runs in the same session of Ray; Ray names a worker after its actor."""
    table = processes()
    own = [process for process in table.values() if process.session == table[neighbour].session]
    return next(process.pid for process in own if process.arguments()[0].startswith(AGENT_TITLE))
