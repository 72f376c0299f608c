"""Spare devices: who moves to one and when, what a successor finds, and what is held, released or refused."""

from __future__ import annotations

import asyncio
import errno
import itertools
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import slots
from coordinator.assembly import RankLauncher
from coordinator.devices import (
    NONE_MOVED,
    RESERVE,
    Devices,
    Hold,
    Release,
    Situation,
    Slot,
    choose,
    next_move,
    slot_text,
    who,
)
from coordinator.events import EventLog
from coordinator.fences import Fences, SupersededError
from coordinator.metrics import Metrics
from coordinator.replica import service as replica_service
from coordinator.replica.config import ReplicaConfig
from coordinator.replica.core import ReplicaCore
from coordinator.replica.events import Acquitted, Died, Fault, Ready, Started, StartEnded, StoreOpened, Tick
from coordinator.replica.service import Callbacks, ReplicaService
from coordinator.replica.state import State
from coordinator.reserve import Want
from coordinator.service import Service
from echelon.errors import ConfigError, InternalError
from tests.unit.test_places import FewPlaces
from tests.unit.test_places import Slot as Group
from tests.unit.test_replica import PLAN, RESIDENT, hello
from worker.spec import RankSpec

HOME: dict[Slot, str] = {(0, 0): "a", (0, 1): "a"}
QUIET = Situation(1, NONE_MOVED, HOME, lost=(), serving=True)
MOVED = Devices({(0, 1): (RESERVE, 0)}, {(0, 1): "a"})
AFTER = {**HOME, (RESERVE, 0): "b"}


@pytest.mark.parametrize(
    ("situation", "move", "reason"),
    [
        (QUIET, Hold((RESERVE, 0)), "0 of 1 are held"),
        (replace(QUIET, wanted=0), None, "as many"),
        (replace(QUIET, serving=False), None, "its ranks come first"),
        (replace(QUIET, found=AFTER), None, "as many"),
        (replace(QUIET, found=AFTER, wanted=2), Hold((RESERVE, 1)), "1 of 2"),
        (replace(QUIET, found=AFTER, wanted=0, serving=False), Release((RESERVE, 0)), "0 are to be held"),
        (replace(QUIET, found=AFTER, lost={"b"}, serving=False), Release((RESERVE, 0)), "its node is lost"),
        (replace(QUIET, found=HOME | {(RESERVE, 0): ""}), Release((RESERVE, 0)), "its node is lost"),
        (replace(QUIET, found=HOME | {(0, 1): ""}), Hold((RESERVE, 0)), "0 of 1"),  # what a rank waits for is no spare
        (replace(QUIET, devices=MOVED, found=AFTER), Hold((RESERVE, 1)), "0 of 1"),
        (replace(QUIET, devices=MOVED, found=AFTER, wanted=0), None, "as many"),
        (replace(QUIET, devices=MOVED, found=AFTER | {(0, 1): "c"}), Release((0, 1)), "that was taken out"),
        (replace(QUIET, devices=MOVED, found={}), Release((0, 1)), "that was taken out"),  # another Ray
        (replace(QUIET, devices=Devices(MOVED.moved), found=AFTER), Release((0, 1)), "its rank has another"),
        (replace(QUIET, devices=Devices(MOVED.moved), found={(0, 0): "a"}), Hold((RESERVE, 1)), "0 of 1"),
    ],
)
def test_one_move_at_a_time(situation: Situation, move: Hold | Release | None, reason: str) -> None:
    decided, why = next_move(situation)
    assert decided == move
    assert reason in why


def test_a_spare_device_near_the_shard_is_taken_first_and_none_on_a_lost_node() -> None:
    free = {(RESERVE, 0): "a", (RESERVE, 1): "b", (RESERVE, 2): ""}
    assert choose(free, ()) == (RESERVE, 0)
    assert choose(free, (), near="b") == (RESERVE, 1)
    assert choose(free, {"b"}, near="b") == (RESERVE, 0)
    assert choose(free, {"a", "b"}) is None


RANKS = [(replica, rank) for replica in (0, 1) for rank in (0, 1)]
CHANGES = st.lists(st.tuples(st.sampled_from(RANKS), st.booleans(), st.sampled_from((None, 0, 1))), max_size=12)


@given(CHANGES)
def test_no_two_ranks_ever_have_one_slot_and_none_has_one_that_is_out(
    changes: list[tuple[Slot, bool, int | None]],
) -> None:
    devices = NONE_MOVED
    for number, (rank, out, forgotten) in enumerate(changes):
        devices = devices.replaced(rank, (RESERVE, number), "a" if out else "")
        if forgotten is not None:
            devices = devices.without_replica(forgotten)
        has = [devices.slot_of(each) for each in RANKS]
        assert len(set(has)) == len(RANKS)
        assert not set(has) & devices.out.keys()
        assert [devices.rank_of(slot) for slot in has] == RANKS
        assert Devices.from_json(devices.to_json()) == devices


def test_people_are_told_whose_slot_it_is() -> None:
    assert [slot_text((0, 1)), slot_text((RESERVE, 2))] == ["0/1", "device/2"]
    assert [who((0, 1)), who((RESERVE, 2))] == ["rank 1 of replica 0", "spare device 2"]


# Stories: a replica of two ranks, over a Ray of a few places and a state directory.


class Site:
    """A coordinator at work, and the next one after it; processes are as good as told."""

    def __init__(self, ray: FewPlaces, folder: Path, spare_devices: int) -> None:
        self.ray = ray
        self.spare_devices = spare_devices
        self.now = 100.0
        self.warm: set[Slot] = set()
        self.started_from: dict[int, str] = {}
        self.served = False
        self.killed = 0  # the last epoch for which all processes before it were
        self._folder = folder
        self._fences = Fences.open(folder)
        self._begin()

    def _begin(self) -> None:
        fences, events = self._fences, EventLog(self._fences.term)

        def persist(devices: Devices) -> None:
            """Nobody moves before the next epoch is on disk and every process of the last one is gone."""
            assert self.killed == fences.epoch(0) == self.replica.core.fence.epoch
            fences.persist_devices(devices)

        self.ray.connect(fences.devices, persist, lambda *event: events.emit(*event))
        self.events, self.reserve = events, self.ray.cluster.reserve
        cluster, config = self.ray.cluster, SimpleNamespace(internal_address="h:1", device="cpu", heartbeat_s=0.5)
        for name in ("connect", "launch", "kill"):
            setattr(cluster, name, getattr(self, f"_{name}"))
        core = ReplicaCore(
            ReplicaConfig(replica=0, term=fences.term, epoch=fences.epoch(0), plan=PLAN, served=self.served)
        )
        launcher = RankLauncher(cluster, cast(Any, self), cast(Any, config), fences)
        service = cast(Service, SimpleNamespace(events=events, metrics=Metrics.create(), post=lambda event: None))
        self.replica = ReplicaService(
            0,
            core,
            launcher,
            service,
            Callbacks(
                persist_epoch=lambda epoch: fences.persist_epoch(0, epoch),
                loading=lambda loaded, total: None,
                serving=lambda serving: None,
                fail=lambda error: pytest.fail(str(error)),
            ),
        )

    # What a launcher asks of the parts that are not here.

    async def _connect(self) -> None: ...

    async def _kill(self, replica: int, suspect: int | None) -> None:
        self.killed = self.replica.core.fence.epoch

    async def start_rank(self, spec: RankSpec) -> bool:
        """As Spares does."""
        slot = self.reserve.slot_of(spec.replica, spec.rank)
        if slot not in self.warm or self.ray.slots[slot].node in self.ray.cluster._nodes.lost:
            return False
        self.warm.discard(slot)
        self.started_from[spec.rank] = "warm"
        return True

    async def _launch(self, spec: RankSpec, slot: object) -> int:
        self.started_from[spec.rank] = "cold"
        return 1

    # What happens.

    async def serve(self) -> None:
        """From launched to ready."""
        core, name = self.replica.core, self.replica.core.incarnation()
        await until(lambda: core.state is State.LAUNCHING and len(self.started_from) == 2, "both to be started")
        self.started_from_last, self.started_from = self.started_from, {}
        for rank in (0, 1):
            self.replica.attach(hello(rank, name))
        for event in (StoreOpened(0, name, "h:1"), Ready(0, name, RESIDENT), Ready(1, name, RESIDENT), StartEnded()):
            self.replica.post(event)
        assert core.state is State.READY
        self.served = True

    async def start(self) -> None:
        self.replica.post(Started())
        await self.serve()

    async def hold(self) -> None:
        """All that the reserve has to do."""
        for _ in range(8):
            await self.reserve.look()
            serving = self.replica.core.state is State.READY
            await self.reserve.tend(Want(self.spare_devices, 2, "cpu", serving))

    async def flap(self, rank: int) -> None:
        """Until its budget is spent: the last epoch is not waited for."""
        for number in range(4):
            self.now += 20.0
            name = self.replica.core.incarnation()
            self.replica.post(Fault(rank, name, "stepping", "CUDA error", 1, 1, requests=("a",)))
            if number < 3:
                await self.serve()
        await until(lambda: self.replica.core.state is not State.FENCING, "the last epoch to be over")

    async def lose(self, node: str) -> None:
        """A node, with what ran there."""
        del self.ray.cluster._nodes.agents[node]
        self.ray.free[node] = 0
        self.warm -= {slot for slot, group in self.ray.slots.items() if group.node == node}
        for rank in (0, 1):
            if self.ray.slots[self.reserve.slot_of(0, rank)].node == node:
                self.now += 20.0
                self.replica.post(Died(rank, self.replica.core.incarnation()))

    async def next_coordinator(self) -> None:
        """It adopts the ranks."""
        epoch = self.replica.core.fence.epoch
        self.replica.close()
        self._fences.close()
        self._fences = Fences.open(self._folder)
        self._begin()
        await self.reserve.adopt()
        self.replica.post(Started(frozenset({(rank, str(epoch)) for rank in (0, 1)})))
        for rank in (0, 1):
            self.replica.attach(hello(rank, str(epoch), "ready", epoch=epoch, resident=RESIDENT))
        assert self.replica.core.state is State.READY and self.replica.core.adopted

    # What has become of it.

    def state(self) -> str:
        return self.replica.core.state.value

    def where(self) -> list[str]:
        """Of each rank: its slot, and the node of that."""
        has = [self.reserve.slot_of(0, rank) for rank in (0, 1)]
        return [f"{slot_text(slot)}@{self.ray.slots[slot].node}" for slot in has]

    def others(self) -> list[str]:
        return [f"{each.state} {each.slot}@{each.node_id}" for each in self.reserve.describe() if each.state != "used"]

    def told(self, *kinds: str) -> Iterator[tuple[str, dict[str, object]]]:
        return ((event.subject, dict(event.detail)) for event in self.events._events if event.kind in kinds)


async def until(condition: Callable[[], bool], what: str) -> None:
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"waited for {what}")


@dataclass
class Story:
    """What happens to a site, told in order; `ends` carries it out."""

    monkeypatch: pytest.MonkeyPatch
    folder: Path
    free: dict[str, int] = field(default_factory=dict)
    count: int = 1
    steps: list[Callable[[Site], Coroutine[Any, Any, None]]] = field(default_factory=list)

    def nodes(self, **free: int) -> Story:
        self.free = free
        return self

    def spare_devices(self, count: int) -> Story:
        self.count = count
        return self

    def then(self, step: Callable[[Site], Coroutine[Any, Any, None]]) -> Story:
        self.steps.append(step)
        return self

    def flap(self, rank: int) -> Story:
        return self.then(lambda site: site.flap(rank))

    def serve(self) -> Story:
        return self.then(Site.serve)

    def hold(self) -> Story:
        return self.then(Site.hold)

    def lose(self, node: str) -> Story:
        return self.then(lambda site: site.lose(node))

    def join(self, node: str, places: int) -> Story:
        async def step(site: Site) -> None:
            site.ray.free[node] = places
            await site.ray.list_nodes()
            site.ray.cluster._nodes.agents[node] = object()

        return self.then(step)

    def warm(self, slot: Slot) -> Story:
        async def step(site: Site) -> None:
            site.warm.add(slot)

        return self.then(step)

    def next_coordinator(self) -> Story:
        return self.then(Site.next_coordinator)

    def ends(self, check: Callable[[Site], None]) -> None:
        async def tell() -> None:
            site = Site(FewPlaces(self.monkeypatch, **self.free), self.folder, self.count)
            clock = SimpleNamespace(monotonic=lambda: site.now)
            self.monkeypatch.setattr(replica_service, "time", clock)
            await site.start()
            await site.hold()
            for step in self.steps:
                await step(site)
            check(site)
            site.replica.close()

        asyncio.run(asyncio.wait_for(tell(), 120.0))


@pytest.fixture
def story(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Story:
    return Story(monkeypatch, tmp_path)


def test_a_rank_moves_off_a_device_that_flaps_at_once_and_the_device_is_given_to_nobody(story: Story) -> None:
    def check(site: Site) -> None:
        assert site.where() == ["0/0@a", "device/0@a"]
        assert site.others() == ["out 0/1@a"], "Ray has no room for another"
        ((subject, detail),) = site.told("device.replaced")
        assert subject == "rank/0/1" and detail["had"] == "0/1" and detail["has"] == "device/0"
        ((lacking, shortage),) = site.told("device.no_room")
        assert lacking == "device/1" and "no room for spare device 1" in str(shortage["reason"])

    story.nodes(a=3).flap(1).serve().hold().ends(check)


def test_with_no_spare_device_left_the_next_one_is_waited_for(story: Story) -> None:
    def check(site: Site) -> None:
        assert site.state() == "waiting"
        assert site.where() == ["0/0@a", "device/0@a"]
        assert [subject for subject, _ in site.told("device.quarantined")] == ["rank/0/1", "rank/0/0"]
        site.now += 29.0
        site.replica.post(Tick())
        assert site.state() == "waiting"
        site.now += 1.5
        site.replica.post(Tick())
        assert site.state() == "launching", "on the device that it had"

    story.nodes(a=3).flap(1).serve().flap(0).ends(check)


def test_a_device_that_was_taken_over_has_a_budget_of_its_own(story: Story) -> None:
    """Three more faults of the rank that has moved say nothing against its new device that four would."""

    def check(site: Site) -> None:
        assert site.where() == ["0/0@a", "device/1@a"]
        assert site.others() == ["out 0/1@a", "out device/0@a"]

    story.nodes(a=4).spare_devices(2).flap(1).serve().flap(1).serve().hold().ends(check)


def test_what_a_request_was_to_blame_for_moves_nobody(story: Story) -> None:
    async def acquitted(site: Site) -> None:
        for _ in range(3):
            site.now += 20.0
            site.replica.post(Fault(1, site.replica.core.incarnation(), "stepping", "e", 1, 1, requests=("a",)))
            await site.serve()
        site.replica.post(Acquitted())

    story.nodes(a=3).then(acquitted).then(acquitted).ends(lambda site: check_at_home(site))


def check_at_home(site: Site) -> None:
    assert site.where() == ["0/0@a", "0/1@a"]
    assert site.others() == ["free device/0@a"]


def test_a_rank_whose_node_dies_is_started_on_a_spare_device_although_there_is_other_room(story: Story) -> None:
    def check(site: Site) -> None:
        assert site.where() == ["0/0@a", "device/0@c"]
        ((subject, detail),) = site.told("device.replaced")
        assert (subject, detail["reason"], detail["node"]) == ("rank/0/1", "its node is lost", "c")
        assert site.others() == []
        assert (0, 1) not in site.ray.slots, "what it had is left, and not held elsewhere by Ray"

    story.nodes(a=1, b=1, c=1).join("d", 1).lose("b").serve().ends(check)


def test_a_warm_process_on_the_spare_device_becomes_the_rank(story: Story) -> None:
    def check(site: Site) -> None:
        assert site.started_from_last == {0: "cold", 1: "warm"}

    story.nodes(a=1, b=1, c=1).warm((RESERVE, 0)).lose("b").serve().ends(check)


def test_and_where_the_device_flapped_too(story: Story) -> None:
    def check(site: Site) -> None:
        assert site.started_from_last == {0: "cold", 1: "warm"}

    story.nodes(a=3).warm((RESERVE, 0)).flap(1).serve().ends(check)


def test_the_last_node_is_waited_for_when_no_spare_device_is_left(story: Story) -> None:
    async def waits(site: Site) -> None:
        await until(lambda: "no room for rank 1" in site.replica.core.reason, "the rank to lack room")

    def check(site: Site) -> None:
        assert site.where() == ["0/0@a", "device/0@d"], "where it was to be last, made anew"

    story.nodes(a=1, b=1, c=1).lose("b").serve().lose("c").then(waits).join("d", 1).serve().ends(check)


def test_a_successor_adopts_ranks_where_they_are_and_starts_them_there_again(story: Story) -> None:
    async def found(site: Site) -> None:
        assert site.where() == ["0/0@a", "device/0@a"]
        assert site.others() == ["out 0/1@a", "free device/1@a"]
        site.now += 20.0
        site.replica.post(Died(1, site.replica.core.incarnation()))

    def check(site: Site) -> None:
        assert site.where() == ["0/0@a", "device/0@a"]
        assert site.others() == ["out 0/1@a", "free device/1@a"]
        assert site.ray.slots[0, 1].node == "a", "and the bad device is still held"
        assert not list(site.told("device.replaced"))

    story.nodes(a=4).flap(1).serve().hold().next_coordinator().then(found).serve().hold().ends(check)


def test_a_successor_moves_the_next_rank_to_what_its_predecessor_held(story: Story) -> None:
    def check(site: Site) -> None:
        assert site.where() == ["device/0@a", "0/1@a"]

    story.nodes(a=3).next_coordinator().flap(0).serve().ends(check)


def test_a_spare_device_goes_with_its_node_and_another_is_held_where_there_is_room(story: Story) -> None:
    def check(site: Site) -> None:
        assert site.where() == ["0/0@a", "0/1@a"], "no rank has noticed"
        assert [f"{subject}@{detail['node']}" for subject, detail in site.told("device.held")] == [
            "device/0@b",
            "device/0@c",
        ]
        assert [(subject, detail["reason"]) for subject, detail in site.told("device.released")] == [
            ("device/0", "its node is lost")
        ]
        assert site.others() == ["free device/0@c"]

    async def empty(site: Site) -> None:
        assert site.others() == []
        site.reserve._not_before_s = 0.0  # as after ten seconds

    story.nodes(a=2, b=1).lose("b").hold().then(empty).join("c", 1).hold().ends(check)


def test_fewer_are_held_as_soon_as_fewer_are_wanted(story: Story) -> None:
    async def lowered(site: Site) -> None:
        assert site.others() == ["free device/0@a", "free device/1@a"]
        site.spare_devices = 1

    story.nodes(a=4).spare_devices(2).then(lowered).hold().ends(check_at_home)


def test_a_move_that_cannot_be_written_does_not_happen_and_the_device_is_waited_for(story: Story) -> None:
    async def full(site: Site) -> None:
        def refuse(devices: Devices) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        site.reserve._persist = refuse

    def check(site: Site) -> None:
        assert site.replica.core.state is State.WAITING
        check_at_home(site)
        assert ["No space left" in str(detail["error"]) for _, detail in site.told("device.not_replaced")] == [True]

    story.nodes(a=3).then(full).flap(1).ends(check)


def test_one_that_was_superseded_moves_nobody(story: Story) -> None:
    async def superseded(site: Site) -> None:
        site._folder.joinpath("lock").unlink()
        Fences.open(site._folder).close()
        with pytest.raises(SupersededError):
            site.reserve.take((0, 1), "its node is lost")

    story.nodes(a=3).then(superseded).ends(check_at_home)


def test_a_replica_that_is_no_more_gives_back_what_its_ranks_had_moved_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def work() -> None:
        ray = FewPlaces(monkeypatch, a=6)
        for replica, rank in itertools.product((0, 1), (0, 1)):
            await ray.wanted(replica, rank)
        reserve = ray.cluster.reserve
        reserve.devices = Devices({(1, 1): (RESERVE, 0)}, {(1, 1): "a"})
        await ray.wanted(1, 1)
        ended: list[str] = []

        async def end(prefix: str, first: str = "") -> None:
            ended.append(prefix)

        async def nobody() -> list[Any]:
            return []

        for name, does in (("end_all", end), ("_living", nobody)):
            monkeypatch.setattr(ray.cluster, name, does)
        discarded: list[str] = []
        monkeypatch.setattr(slots, "discard_actors", lambda prefix, kept=(): discarded.append(prefix))
        await ray.cluster.end_surplus(1)
        assert discarded == ["spare/c0ffee/1/", "spare/c0ffee/-1/0/"], "those of the spare device that it had, alone"
        assert reserve.devices == NONE_MOVED
        assert set(ray.slots) == {(0, 0), (0, 1), (RESERVE, 0)}
        await reserve.look()
        assert list(reserve.free) == [(RESERVE, 0)]

    asyncio.run(asyncio.wait_for(work(), 60.0))


def test_a_spare_device_that_is_held_too_late_for_the_fault_ends_the_wait_for_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was sought while all served, and took the last room while a rank began to seek some."""

    async def work() -> None:
        ray = FewPlaces(monkeypatch, a=1)
        assert await ray.wanted(0, 0) == "a"
        waiting = asyncio.create_task(ray.wanted(0, 1))
        await until(lambda: bool(ray.told), "the rank to lack room")
        ray.slots[RESERVE, 0] = Group(ray, (), "a")
        await ray.cluster.reserve.look()
        assert await waiting == "a"
        assert set(ray.slots) == {(0, 0), (RESERVE, 0)}

    asyncio.run(asyncio.wait_for(work(), 60.0))


def test_what_a_first_start_lacks_is_not_taken_from_the_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout that needs more devices than there are beside the spare ones is told so."""
    monkeypatch.setattr(slots, "SLOT_TIMEOUT_S", 0.05)

    async def work() -> None:
        ray = FewPlaces(monkeypatch, a=0)
        ray.slots[RESERVE, 0] = Group(ray, (), "a")
        await ray.cluster.reserve.look()
        with pytest.raises(InternalError, match="no room for rank 1 of replica 0; held as spare devices: 1"):
            await ray.cluster._places.take(0, 1, "cpu")

    asyncio.run(asyncio.wait_for(work(), 60.0))


def test_a_replica_that_yields_keeps_what_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        ray = FewPlaces(monkeypatch, a=3)
        assert [await ray.wanted(0, 0), await ray.wanted(0, 1)] == ["a", "a"]
        ray.cluster.reserve.devices = Devices({(0, 1): (RESERVE, 0)}, {(0, 1): "a"})
        assert await ray.wanted(0, 1) == "a"
        await ray.cluster.reserve.give_back(0)
        assert set(ray.slots) == {(0, 1)}

    asyncio.run(asyncio.wait_for(work(), 60.0))


def test_more_than_the_cluster_has_is_refused_with_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "SLOT_TIMEOUT_S", 0.05)
    there = 5
    monkeypatch.setattr(slots, "devices_of_ray", lambda device: there)

    async def work() -> None:
        nonlocal there
        reserve = FewPlaces(monkeypatch, a=5).cluster.reserve
        await reserve.check(Want(1, 4, "cuda", False))
        await reserve.check(Want(0, 9, "cuda", False))  # ranks say themselves what they lack
        said = r"2 beside 4 ranks: 4 \+ 2 = 6 GPUs, and the nodes of Ray have 5"
        with pytest.raises(ConfigError, match=said) as told:
            await reserve.check(Want(2, 4, "cuda", False))
        assert told.value.field == "spare_devices"
        waiting = asyncio.create_task(reserve.check(Want(2, 4, "cuda", False)))
        await asyncio.sleep(0.02)
        there = 6
        await waiting

    asyncio.run(asyncio.wait_for(work(), 60.0))
