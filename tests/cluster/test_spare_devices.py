"""Spare devices on a real Ray: ranks move to them off a device that is out and off a node that died, and stay there."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coordinator import slots
from coordinator.cluster import Cluster
from coordinator.devices import NONE_MOVED, RESERVE, Devices
from coordinator.reserve import Want
from echelon.errors import EchelonError
from echelon.testing import LocalCluster
from echelon.types import Cluster as Status
from tests.cluster.conftest import Case
from tests.cluster.reference import Reference
from tests.cluster.streams import alive, assert_undisturbed, stream_through
from tests.tiny import POISON, make_checkpoint, make_poisoned_checkpoint
from worker.spec import RankSpec, spare_name

pytestmark = [pytest.mark.cluster, pytest.mark.long]

SLOW_S = 120.0  # for what takes ten on a machine with nothing else to do
NAME = "5bade51c"


def test_a_rank_moves_off_a_device_that_is_out_and_its_successor_finds_it(
    ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asyncio.run(move(ray_address))


def spec(rank: int, incarnation: str) -> RankSpec:
    return RankSpec(
        coordinator_address="127.0.0.1:1", cluster=NAME, replica=0, rank=rank, incarnation=incarnation,
        device="cpu", heartbeat_s=0.5, term=1,
    )  # fmt: skip


async def move(address: str) -> None:
    on_disk, told = [NONE_MOVED], list[str]()

    def tell(kind: str, subject: str, detail: Mapping[str, object]) -> None:
        told.append(f"{kind} {subject}")

    def cluster(term: int) -> Cluster:
        return Cluster((NAME, term), address, 30.0, tell, on_disk[-1], on_disk.append)

    first = cluster(1)
    await first.connect()
    for rank in (0, 1):
        await first.launch(spec(rank, "1"), await first.place(spec(rank, "1")))
    await first.reserve.adopt()
    await first.reserve.tend(Want(1, 2, "cpu", serving=True))
    assert "device.held device/0" in told
    await first.kill(0, suspect=1)
    assert await first.reserve.replace(0, 1)
    assert not await first.reserve.replace(0, 0), "there was one"
    pids = [await first.launch(spec(rank, "2"), await first.place(spec(rank, "2"))) for rank in (0, 1)]
    held = await asyncio.to_thread(slots.find_slots, NAME)
    assert set(held) == {(0, 0), (0, 1), (RESERVE, 0)}, "the device that is out is held on"
    await first.disconnect()

    second = cluster(2)
    await second.connect()
    await second.reserve.adopt()
    assert await second.survivors(0) == {(0, "2"), (1, "2")}
    assert [(each.state, each.slot) for each in second.reserve.describe()] == [("out", "0/1"), ("used", "device/0")]
    waiting = await second.launch_spare(spare_name(NAME, RESERVE, 0, "1"), RESERVE, 0, "cpu")
    await second.kill(0)
    assert not any(map(alive, pids))
    assert [spare.name for spare in await second.spares()] == [waiting.name], "who waits there is none of the killed"
    while not (await second.ask(waiting.actor.spare, ""))[1]:
        await asyncio.sleep(0.1)
    await second.start_spare(waiting, spec(1, "3"), timeout_s=10)
    assert await second.survivors(0) == {(1, "3")}
    await second.kill(0)
    pid = await second.launch(spec(1, "4"), await second.place(spec(1, "4")))
    assert await asyncio.to_thread(slots.find_slots, NAME) == held, "each where it was"
    await second.remove()
    assert not alive(pid)
    assert on_disk == [NONE_MOVED, Devices({(0, 1): (RESERVE, 0)}, {(0, 1): held[0, 1]})]


def test_a_rank_of_a_node_that_dies_starts_on_a_spare_device_and_stays_there(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model")
    flags = {"pipeline": 2, "dtype": "float64", "nodes": (1, 1, 1), "spares": 1, "spare_devices": 1}
    with LocalCluster(model, **flags) as cluster:  # type: ignore[arg-type]
        case = Case("spare devices", cluster, Reference(model))
        before = cluster.wait(lambda now: devices(now) == ["free device/0"], "a spare device", SLOW_S)
        cluster.wait_spares(3, SLOW_S)
        on_device = next(spare for spare in cluster.spares() if spare.on_spare_device)
        head = next(node.node_id for node in cluster.nodes() if node.head)
        number = next(number for number, rank in enumerate(before.ranks) if rank.node_id != head)
        (spare,) = before.spare_devices
        victim = next(node for node in cluster.nodes() if node.node_id == before.ranks[number].node_id)
        assert_undisturbed(case, stream_through(cluster.client(), lambda: cluster.kill(victim)))
        after = cluster.status()
        assert devices(after) == [f"used by 0/{number} device/0"]
        assert (after.ranks[number].node_id, after.ranks[number].pid) == (spare.node_id, on_device.pid)
        assert kinds(cluster)["device.replaced"] == 1 and not kinds(cluster)["rank.no_room"]

        assert_undisturbed(case, stream_through(cluster.client(), lambda: cluster.kill("coordinator")))
        adopted = cluster.wait(lambda now: devices(now) == devices(after), "the successor to know of it", SLOW_S)
        assert [rank.pid for rank in adopted.ranks] == [rank.pid for rank in after.ranks]
        assert_undisturbed(case, stream_through(cluster.client(), lambda: cluster.kill(number)))
        assert cluster.ranks()[number].node_id == spare.node_id
        assert devices(cluster.status()) == devices(after)


def test_a_device_whose_steps_break_again_and_again_is_replaced(ray_address: str, tmp_path: Path) -> None:
    """Rows of several requests in one step that are not finite are the device's fault, as far as anybody can tell."""
    flags = {"tensor": 2, "dtype": "float64", "ray_address": ray_address, "spares": 3, "spare_devices": 1}
    with LocalCluster(make_poisoned_checkpoint(tmp_path), **flags) as cluster:  # type: ignore[arg-type]
        cluster.wait(lambda now: devices(now) == ["free device/0"], "a spare device", SLOW_S)
        cluster.wait_spares(3, SLOW_S)
        for _ in range(8):  # two of them break a step together twice, then each alone is found out
            spoil(cluster)
            if kinds(cluster)["device.replaced"]:
                break
        told = [event for event in cluster.events() if event.kind in ("device.quarantined", "device.replaced")]
        assert [(event.kind, event.subject) for event in told] == [
            ("device.quarantined", "rank/0/0"),
            ("device.replaced", "rank/0/0"),
        ]
        assert not kinds(cluster)["replica.failed"]
        good = cluster.client().generate(token_ids=[5, 6], max_tokens=4, logit_bias={POISON: -100.0})
        assert len(good.token_ids) == 4
        expected = ["out 0/0", "used by 0/0 device/0", "free device/1"]
        cluster.wait(lambda now: devices(now) == expected, "another spare device", SLOW_S)


def spoil(cluster: LocalCluster) -> None:
    """Requests at once whose scores are not finite; all of them end by that."""

    client = cluster.client()

    def ask(number: int) -> str:
        with pytest.raises(EchelonError) as raised:
            client.generate(token_ids=[5, POISON, 6 + number], max_tokens=4, timeout_s=SLOW_S)
        return raised.value.reason

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(8))) == {"NON_FINITE"}


def kinds(cluster: LocalCluster) -> Counter[str]:
    return Counter(event.kind for event in cluster.events())


def devices(cluster: Status) -> list[str]:
    """What is told of each device beside the ranks' own."""
    used = {device.slot: f"used by {device.rank}" for device in cluster.spare_devices if device.rank}
    return [f"{used.get(device.slot, device.state)} {device.slot}" for device in cluster.spare_devices]
