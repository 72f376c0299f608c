"""Spares: where they are wanted, when one is started or ended, and that nobody waits for one that is not up to it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest

from coordinator import spares
from coordinator.cluster import Cluster, SpareProcess
from coordinator.devices import RESERVE, Slot
from coordinator.events import EventLog
from coordinator.spares import (
    HAND_OVER_S,
    SETTLED_S,
    End,
    Need,
    Situation,
    Spares,
    Start,
    next_move,
    wanted_slots,
)
from echelon.errors import InternalError
from worker.spec import RankSpec

BOTH: tuple[Slot, ...] = ((0, 0), (0, 1))
QUIET = Situation(wanted=BOTH, held=(), warming=False, serving_s=60.0, queued=0)


@pytest.mark.parametrize(
    ("spares", "wanted"),
    [
        (0, []),
        (1, [(0, 0), (0, 1), (RESERVE, 1)]),
        (2, [(0, 0), (0, 1), (1, 0), (RESERVE, 0), (RESERVE, 1)]),
        (9, [(0, 0), (0, 1), (1, 0), (1, 1), (RESERVE, 0), (RESERVE, 1)]),
    ],
)
def test_each_node_has_so_many_at_most_one_a_slot(spares: int, wanted: list[Slot]) -> None:
    """Those of ranks first, then spare devices."""
    slots = [((0, 0), "a"), ((0, 1), "b"), ((1, 0), "b"), ((1, 1), "b"), ((RESERVE, 0), "a"), ((RESERVE, 1), "c")]
    assert wanted_slots(slots, spares) == wanted


@pytest.mark.parametrize(
    ("situation", "move", "reason"),
    [
        (QUIET, Start((0, 0)), "its slot has none"),
        (replace(QUIET, held=((0, 0),)), Start((0, 1)), "its slot has none"),
        (replace(QUIET, held=BOTH), None, "every slot has"),
        (replace(QUIET, held=((0, 0),), warming=True), None, "another is getting warm"),
        (replace(QUIET, serving_s=None), None, "a replica does not serve"),
        (replace(QUIET, serving_s=SETTLED_S / 2), None, "for what was interrupted"),
        (replace(QUIET, queued=3), None, "3 requests wait"),
        (replace(QUIET, held=((0, 2), *BOTH)), End((0, 2)), "its slot is to have none"),
        (replace(QUIET, wanted=(), held=((0, 0),), queued=3), End((0, 0)), "its slot is to have none"),
        (replace(QUIET, wanted=(), held=((0, 0),), serving_s=None), None, "a replica does not serve"),
    ],
)
def test_one_at_a_time_while_nobody_waits(situation: Situation, move: Start | End | None, reason: str) -> None:
    decided, why = next_move(situation)
    assert decided == move
    assert reason in why


@dataclass
class ScriptedCluster:
    """Ray's part, for one slot. answers: of a process that is asked how it is, or told to be a rank."""

    answers: list[object] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    launched: list[str] = field(default_factory=list)
    left: list[SpareProcess] = field(default_factory=list)
    launch_error: InternalError | None = None
    shards: list[str] = field(default_factory=list)
    unreachable: bool = False

    async def spares(self) -> list[SpareProcess]:
        return self.left

    async def launch_spare(self, name: str, replica: int, rank: int, device: str) -> SpareProcess:
        self.launched.append(name)
        if self.launch_error:
            raise self.launch_error
        return SpareProcess((replica, rank), name, "a", self)

    async def ask(self, method: object, shard: str, timeout_s: float) -> object:
        self.shards.append(shard)
        return self._answer()

    async def start_spare(self, spare: SpareProcess, spec: RankSpec, timeout_s: float) -> None:
        self._answer()

    async def end_all(self, prefix: str) -> None:
        self.ended.append(prefix)
        if self.unreachable:
            raise InternalError("Ray does not answer")

    def spare(self) -> object:
        raise AssertionError("asked through the cluster")

    def _answer(self) -> object:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def shard_of(slot: Slot) -> str:
    return f"/store/{slot[1]}"


@dataclass
class Shell:
    spares: Spares
    cluster: ScriptedCluster
    events: EventLog

    def told(self) -> list[str]:
        return [event.kind for event in self.events._events]


def shell(answers: Sequence[object], wanted: int = 1, serving_s: float = 60.0, slot: Slot = (0, 0)) -> Shell:
    cluster, events = ScriptedCluster(list(answers)), EventLog(3)
    need = Need([(slot, "a")], wanted, serving_s, 0, shard_of, lambda replica, rank: slot)
    spares = Spares(cast(Any, cluster), "c", 3, "cpu", lambda: need, events)
    return Shell(spares, cluster, events)


SPEC = RankSpec(
    coordinator_address="a:1", cluster="c", replica=0, rank=0, incarnation="7", device="cpu", heartbeat_s=1, term=3
)


def test_one_on_a_spare_device_becomes_the_rank_that_has_moved_there() -> None:
    async def work() -> None:
        made = shell([(5, True), None], slot=(RESERVE, 4))
        await made.spares._move()
        (spare,) = made.spares.describe()
        assert (spare.on_spare_device, spare.replica, spare.rank, spare.pid) == (True, 0, 4, 5)
        assert made.cluster.launched == ["spare/c/-1/4/3-1"]
        assert await made.spares.start_rank(SPEC)
        assert [event.subject for event in made.events._events] == ["spare/device/4"] * 2

    asyncio.run(work())


def test_a_spare_is_told_each_time_which_shard_its_rank_would_load() -> None:
    async def work() -> None:
        site = shell([(5, False), (5, True)])
        await site.spares._move()
        await site.spares._ask(site.spares._held[0, 0].process, 0.0)
        assert site.cluster.shards == ["/store/0", "/store/0"]

    asyncio.run(work())


def test_a_warm_one_becomes_the_rank_and_is_held_no_more() -> None:
    async def live() -> None:
        made = shell([(43, False), (43, True), None])
        await made.spares._move()
        (spare,) = made.spares.describe()
        assert (spare.replica, spare.rank, spare.pid, spare.node_id, spare.state) == (0, 0, 43, "a", "warming")
        assert not await made.spares.start_rank(SPEC), "one that is not warm is left alone"
        await made.spares._ask(made.spares._held[0, 0].process, 1.0)
        assert [spare.state for spare in made.spares.describe()] == ["warm"]
        assert await made.spares.start_rank(SPEC)
        assert made.spares.describe() == ()
        assert made.told() == ["spare.warming", "spare.warm", "spare.started"]
        assert made.cluster.launched == ["spare/c/0/0/3-1"]

    asyncio.run(live())


def test_one_that_does_not_take_over_is_given_up_at_once() -> None:
    async def live() -> None:
        made = shell([(43, True), InternalError("no answer in time")])
        await made.spares._move()
        assert not await made.spares.start_rank(SPEC)
        assert not await made.spares.start_rank(SPEC), "and not asked again"
        assert made.told() == ["spare.warm", "spare.lost"]

    asyncio.run(live())


def test_one_that_is_handed_over_as_its_launch_is_given_up_is_not_left_to_itself() -> None:
    """It may be stopped: only the end of the handing over tells, and ends it then."""

    async def live() -> None:
        made, begun, answer, handed = shell([(43, True)]), asyncio.Event(), asyncio.Event(), []

        async def start_spare(spare: SpareProcess, spec: RankSpec, timeout_s: float) -> None:
            begun.set()
            await answer.wait()
            handed.append(spare.name)
            raise InternalError("no answer in time")

        made.cluster.start_spare = start_spare  # type: ignore[method-assign]
        await made.spares._move()
        launch = asyncio.ensure_future(made.spares.start_rank(SPEC))
        await begun.wait()
        launch.cancel()
        await asyncio.wait([launch])
        answer.set()
        await asyncio.sleep(0.01)
        assert launch.cancelled() and handed == made.cluster.launched

    asyncio.run(live())


def test_one_that_no_longer_answers_is_ended() -> None:
    async def live() -> None:
        made = shell([(43, True), InternalError("no answer in time")])
        await made.spares._move()
        await made.spares._ask(made.spares._held[0, 0].process, 1.0)
        assert made.spares.describe() == ()
        assert made.cluster.ended == ["spare/c/0/0/3-1"]
        assert made.told() == ["spare.warm", "spare.lost"]

    asyncio.run(live())


def test_one_whose_launch_was_not_answered_is_ended_for_it_may_have_begun() -> None:
    async def live() -> None:
        made = shell([])
        made.cluster.launch_error = InternalError("no answer in time")
        await made.spares._move()
        assert made.spares.describe() == ()
        assert made.cluster.ended == made.cluster.launched == ["spare/c/0/0/3-1"]
        assert made.told() == ["spare.failed"]
        made.cluster.unreachable = True
        await made.spares._start((0, 0))
        assert made.told() == ["spare.failed", "spare.not_ended", "spare.failed"]

    asyncio.run(live())


def test_a_death_is_told_once_and_one_that_became_a_rank_is_not_taken_back() -> None:
    async def live() -> None:
        made = shell([(43, True), (43, True)])
        await made.spares._move()
        process = made.spares._held[0, 0].process
        asking = asyncio.ensure_future(made.spares._ask(process, 1.0))
        made.spares.died(0, 0)
        made.spares.died(0, 0)
        await asking
        assert made.told()[:2] == ["spare.warm", "spare.lost"]

    asyncio.run(live())


def test_what_a_predecessor_left_is_kept() -> None:
    async def live() -> None:
        made = shell([(43, True)])
        made.cluster.left = [SpareProcess((0, 0), "spare/c/0/0/2-9", "a", made.cluster)]
        await made.spares.adopt()
        await made.spares._move()
        assert [spare.pid for spare in made.spares.describe()] == [43]
        assert made.cluster.launched == [], "the slot has one"

    asyncio.run(live())


def test_of_two_that_a_predecessor_left_in_a_slot_one_is_ended_before_the_other_is_asked() -> None:
    """Nobody would ask for it again, nor end it."""

    async def live() -> None:
        made = shell([(44, True)])
        left = [SpareProcess((0, 0), f"spare/c/0/0/2-{serial}", "a", made.cluster) for serial in (8, 9)]
        made.cluster.left = left
        await made.spares.adopt()
        assert [spare.pid for spare in made.spares.describe()] == [44]
        assert made.cluster.ended == ["spare/c/0/0/2-8"]
        made.cluster.left = left[1:]
        made.cluster.answers.append((44, True))
        await made.spares.adopt()  # again, as after an error of Ray's
        assert [spare.pid for spare in made.spares.describe()] == [44]
        assert made.told() == ["spare.warm"]

    asyncio.run(live())


def test_what_a_predecessor_left_is_asked_all_at_once_and_not_waited_for_longer_than_a_rank_would() -> None:
    """No rank is started before."""

    async def live() -> None:
        made, asked, both = shell([]), [], asyncio.Event()

        async def ask(method: object, shard: str, timeout_s: float) -> object:
            asked.append(timeout_s)
            if len(asked) == 2:
                both.set()
            await asyncio.wait_for(both.wait(), 5)
            return 43, True

        made.cluster.ask = ask  # type: ignore[method-assign]
        made.cluster.left = [SpareProcess((0, rank), f"spare/c/0/{rank}/2-9", "a", made.cluster) for rank in (0, 1)]
        await made.spares.adopt()
        assert [spare.rank for spare in made.spares.describe()] == [0, 1]
        assert asked == [HAND_OVER_S] * 2

    asyncio.run(live())


@pytest.mark.parametrize(("warm", "launched"), [(False, 1), (True, 2)])
def test_one_that_never_got_warm_is_not_started_again_at_once(
    warm: bool, launched: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spares, "TICK_S", 0.0)

    async def live() -> None:
        made = shell([(43, warm)] * 100)
        running = asyncio.create_task(made.spares.run())
        while not made.spares.describe():
            await asyncio.sleep(0)
        made.spares.died(0, 0)
        for _ in range(20):
            await asyncio.sleep(0)
        running.cancel()
        assert len(made.cluster.launched) == launched

    asyncio.run(live())


def test_fewer_are_wanted() -> None:
    async def live() -> None:
        made = shell([(43, True)], wanted=0)
        made.cluster.left = [SpareProcess((0, 0), "spare/c/0/0/2-9", "a", made.cluster)]
        await made.spares.adopt()
        await made.spares._move()
        assert made.cluster.ended == ["spare/c/0/0/2-9"]
        assert made.told() == ["spare.warm", "spare.ended"]

    asyncio.run(live())


def test_the_shell_asks_of_a_cluster_what_a_cluster_can() -> None:
    for name in ("spares", "launch_spare", "ask", "start_spare", "end_all"):
        assert callable(getattr(Cluster, name)), name


def test_one_on_a_lost_node_is_given_up_and_ended_as_far_as_it_can_be_reached() -> None:
    async def live() -> None:
        made = shell([(43, True)])
        await made.spares._move()
        await made.spares.on_node("node.lost", "b")
        assert made.spares.describe() and not made.cluster.ended
        await made.spares.on_node("node.joined", "a")
        assert made.spares.describe()
        made.cluster.unreachable = True
        await made.spares.on_node("node.lost", "a")
        assert made.spares.describe() == () and made.cluster.ended == ["spare/c/0/0/3-1"]
        assert made.told() == ["spare.warm", "spare.lost", "spare.not_ended"]

    asyncio.run(live())
