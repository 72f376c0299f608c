"""What looks after spare devices goes on through errors of Ray and of the disk, and asks nothing for nothing."""

from __future__ import annotations

import asyncio
import errno
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator import reserve as reserve_module
from coordinator import slots
from coordinator.cluster import Cluster
from coordinator.devices import RESERVE, Devices, Slot
from coordinator.fences import SupersededError
from coordinator.process import Coordinator
from coordinator.reserve import Reserve, Want
from echelon.errors import InternalError
from echelon.types import Rank

AWAY = InternalError("Ray does not tell its slots: the GCS is gone")


def made(devices: Devices) -> Reserve:
    return Cluster(("c", 1), "h:1", 30.0, devices=devices).reserve


def asked(monkeypatch: pytest.MonkeyPatch, answers: list[object]) -> list[object]:
    """What Ray answers to whoever looks for slots, one after the other; empty once all was asked for."""

    def find_slots(cluster: str) -> object:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(slots, "find_slots", find_slots)
    monkeypatch.setattr(reserve_module, "TICK_S", 0.001)
    return answers


def looked_after(reserve: Reserve, want: Want, until_empty: list[object]) -> None:
    async def work() -> None:
        running = asyncio.ensure_future(reserve.run(lambda: want))
        while until_empty and not running.done():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        if running.done():
            running.result()
        running.cancel()

    asyncio.run(asyncio.wait_for(work(), 60.0))


def test_a_ray_that_does_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    reserve = made(Devices({}, {(0, 1): "a"}))
    answers: list[object] = [AWAY, OSError(errno.ENOSPC, "No space left on device"), {(0, 1): "b"}]
    monkeypatch.setattr(slots, "give_back", lambda cluster, given: None)
    looked_after(reserve, Want(0, 2, "cpu", serving=True), asked(monkeypatch, answers))
    assert reserve.devices == Devices(), "what Ray has placed anew is not out"


def test_one_that_was_superseded_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[object] = [SupersededError(errno.ESTALE, "another coordinator has taken term 2")]
    with pytest.raises(SupersededError):
        looked_after(made(Devices()), Want(1, 2, "cpu", serving=True), asked(monkeypatch, answers))


def test_without_spare_devices_ray_is_asked_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch, [])
    reserve = made(Devices())
    looked: list[str] = []

    async def look() -> None:
        looked.append("again")

    monkeypatch.setattr(reserve, "look", look)
    looked_after(reserve, Want(0, 2, "cpu", serving=True), [])
    assert not looked


def test_what_a_predecessor_held_can_be_found_later(monkeypatch: pytest.MonkeyPatch) -> None:
    reserve = made(Devices())
    asked(monkeypatch, [AWAY, {(RESERVE, 0): "a"}])

    async def work() -> None:
        await reserve.adopt()
        assert reserve.free == {}
        await reserve.adopt()
        assert reserve.free == {(RESERVE, 0): "a"}

    asyncio.run(work())


def test_a_spare_where_a_rank_has_moved_to_holds_the_shard_of_that_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one on a spare device that nobody has holds none."""
    asked(monkeypatch, [{(0, 0): "a", (RESERVE, 0): "b", (RESERVE, 1): "b"}])
    coordinator: Any = Coordinator.__new__(Coordinator)
    coordinator._cluster = Cluster(("c", 1), "h:1", 30.0, devices=Devices({(0, 1): (RESERVE, 0)}, {(0, 1): "a"}))
    asyncio.run(coordinator._cluster.reserve.adopt())
    layout = SimpleNamespace(config=SimpleNamespace(spares=2), shard_for_device="/store/{}".format)
    coordinator._reconfiguration = SimpleNamespace(layout=layout)
    coordinator._service = SimpleNamespace(core=SimpleNamespace(counts=SimpleNamespace(queued=0)))
    coordinator._replicas = SimpleNamespace(all_serving_s=9.0, ranks=lambda: [rank(0, "a"), rank(1, "b")])
    need = coordinator._need_of_spares()
    wanted: list[tuple[Slot, str]] = [((0, 0), "a"), ((RESERVE, 0), "b"), ((RESERVE, 1), "b")]
    assert need.slots == wanted
    assert [need.shard_of(slot) for slot, _ in wanted] == ["/store/0", "/store/1", ""]
    assert need.slot_of(0, 1) == (RESERVE, 0)


def rank(tensor: int, node_id: str) -> Rank:
    return Rank(
        replica=0, pipeline=0, data=0, tensor=tensor, expert=0, leader=tensor == 0, pid=1, node_id=node_id, epoch=1,
        state="ready",
    )  # fmt: skip
