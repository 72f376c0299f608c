"""ReplicaCore: launch, formation, fencing, adoption, and what late words of dead ranks may not do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.placement import RankMemory, ReplicaPlan
from coordinator.replica.config import START_ATTEMPTS, ReplicaConfig
from coordinator.replica.core import ANOTHER_LAYOUT, ReplicaCore
from coordinator.replica.events import (
    Accept,
    Attached,
    AwaitPersisted,
    Beat,
    Detached,
    Died,
    Effect,
    Emit,
    Fault,
    Form,
    GiveUp,
    Kill,
    Killed,
    Launch,
    LaunchFailed,
    Loading,
    Noted,
    OpenStore,
    Persisted,
    PersistEpoch,
    Progress,
    RankEvent,
    Ready,
    Refuse,
    Relayout,
    ReplicaDown,
    ReplicaUp,
    Resident,
    Retire,
    Retired,
    Started,
    StartEnded,
    StoreOpened,
    Tell,
    Tick,
)
from coordinator.replica.recovery import MAX_BACKOFF_S, backoff_s
from coordinator.replica.state import State
from echelon.internal.link import Fence
from parallel.degrees import Degrees

PLAN = ReplicaPlan(
    degrees=Degrees(tensor=2),
    parameter_bytes=(100, 100),
    block_bytes=(10, 10),
    block_tokens=16,
    max_context=32,
    memory_fraction=0.5,
    shared_memory=True,
    kv_blocks_limit=8,
)
RESIDENT = Resident(100, 80)


def make(epoch: int = 0, term: int = 1) -> ReplicaCore:
    return ReplicaCore(ReplicaConfig(replica=0, term=term, epoch=epoch, plan=PLAN, incarnation_prefix="c-"))


def hello(rank: int, incarnation: str, phase: str = "waiting", **more: object) -> Attached:
    known: dict[str, object] = {"pid": 10 + rank, "node_id": "n", "device": "cpu", "memory_bytes": 10_000} | more
    return Attached(rank=rank, incarnation=incarnation, phase=phase, **known)  # type: ignore[arg-type]


def quiet(effects: list[Effect]) -> list[Effect]:
    return [effect for effect in effects if not isinstance(effect, Emit)]


def launch(core: ReplicaCore, now: float = 0.0) -> str:
    """From Started to all ranks launched; the incarnation."""
    core.step(now, Started())
    core.step(now, Killed(core.fence.epoch))
    return core.incarnation()


def form(core: ReplicaCore, now: float = 1.0) -> list[Effect]:
    """From launched to ready; the last effects."""
    name = core.incarnation()
    core.step(now, hello(0, name))
    core.step(now, hello(1, name))
    core.step(now, StoreOpened(0, name, "h:1"))
    core.step(now, Ready(0, name, RESIDENT))
    return core.step(now, Ready(1, name, RESIDENT))


def test_what_a_rank_notes_is_told_and_changes_nothing() -> None:
    core = make()
    name = launch(core)
    form(core)
    told = core.step(2.0, Noted(1, name, "shard.written", {"bytes": 7}))
    assert told == [Emit("shard.written", "rank/0/1", {"bytes": 7})]
    assert core.step(2.0, Noted(1, "c-0", "shard.written", {"bytes": 7})) == [], "nobody hears the dead"
    assert core.state is State.READY


def test_a_cold_start_persists_and_cleans_before_it_launches() -> None:
    core = make()
    effects = quiet(core.step(0.0, Started()))
    assert effects == [PersistEpoch(1), Kill(1, None)]
    assert quiet(core.step(0.1, Killed(1))) == [Launch(0, "c-1"), Launch(1, "c-1")]
    assert core.state is State.LAUNCHING


def test_formation_waits_for_all_ranks_and_tells_each_what_it_needs() -> None:
    core = make()
    name = launch(core)
    fence = Fence(1, 0, 1)
    assert quiet(core.step(1.0, hello(1, name))) == [Tell(fence, 1, name, Accept())]
    assert quiet(core.step(1.0, hello(0, name))) == [Tell(fence, 0, name, Accept()), Tell(fence, 0, name, OpenStore())]
    told = core.step(1.0, StoreOpened(0, name, "h:1"))
    assert told == [Tell(fence, rank, name, Form("h:1", 8)) for rank in (0, 1)]
    assert core.step(1.1, Progress(0, name, 5, 10)) == []
    assert core.step(1.1, Progress(1, name, 0, 10)) == [Loading(5, 20)]
    assert quiet(core.step(1.2, Ready(0, name, RESIDENT))) == []
    assert quiet(core.step(1.3, Ready(1, name, RESIDENT))) == [ReplicaUp(fence)]
    leader, follower = core.ranks()
    assert (leader.leader, leader.pid, leader.kv_bytes, leader.planned_kv_bytes) == (True, 10, 80, 80)
    assert (follower.leader, follower.tensor, follower.state) == (False, 1, "ready")


def test_a_death_fences_before_anything_else_and_kills_the_suspect_first() -> None:
    core = make()
    name = launch(core)
    assert ReplicaUp(Fence(1, 0, 1)) in form(core)
    effects = quiet(core.step(2.0, Died(1, name)))
    assert [type(effect) for effect in effects] == [PersistEpoch, ReplicaDown, Kill]
    assert effects[0] == PersistEpoch(2)
    assert isinstance(effects[1], ReplicaDown) and effects[1].fence == Fence(1, 0, 1)
    assert effects[2] == Kill(2, suspect=1)
    assert quiet(core.step(2.1, Killed(1))) == [], "an older confirmation must not launch"
    assert quiet(core.step(2.1, Killed(2))) == [Launch(0, "c-2"), Launch(1, "c-2")]
    assert ReplicaUp(Fence(1, 0, 2)) in form(core, 3.0)


def test_words_of_a_dead_incarnation_change_nothing_and_its_hello_is_refused() -> None:
    core = make()
    old = launch(core)
    form(core)
    core.step(2.0, Died(1, old))
    core.step(2.1, Killed(2))
    for event in (Beat(0, old, "ready", 5), Detached(0, old), Died(0, old), Ready(0, old, RESIDENT)):
        assert core.step(3.0, event) == []
    assert core.step(3.0, Fault(0, old, "step", "x")) == []
    assert core.step(3.0, StoreOpened(0, old, "h:9")) == []
    (tell,) = quiet(core.step(3.0, hello(0, old, "ready", epoch=1, resident=RESIDENT)))
    assert isinstance(tell, Tell) and isinstance(tell.command, Refuse) and tell.incarnation == old
    (tell,) = quiet(core.step(3.0, hello(7, core.incarnation())))
    assert isinstance(tell, Tell) and isinstance(tell.command, Refuse)
    assert core.state is State.LAUNCHING


def test_a_stopped_rank_is_found_by_its_silence_and_a_late_coordinator_blames_itself() -> None:
    core = make()
    name = launch(core)
    form(core, 1.0)
    core.step(3.0, Beat(0, name, "ready", 1))
    assert core.step(3.5, Tick()) == []
    assert core.step(23.0, Tick(lag_s=19.5)) == [], "nobody listened for 19.5 s"
    core.step(23.2, Beat(0, name, "ready", 1))
    assert core.step(23.4, Tick()) == []
    effects = quiet(core.step(23.7, Tick()))
    assert Kill(2, suspect=1) in effects


def test_a_wedged_rank_is_found_by_the_deadline_of_its_kind_of_step() -> None:
    core = make()
    name = launch(core)
    form(core, 1.0)

    def beat(now: float, steps: tuple[int, int], slowest_s: float) -> list[Effect]:
        for rank, step in enumerate(steps):
            core.step(now, Beat(rank, name, "stepping", step, "decode of 8 tokens", slowest_s))
        return quiet(core.step(now, Tick()))

    assert beat(2.0, (1, 1), 0.2) == []
    for now in range(3, 6):
        assert beat(now, (2, 1), 0.2) == [], "it may take 4 s"
    effects = beat(6.5, (2, 1), 0.2)
    assert Kill(2, suspect=1) in effects
    (down,) = [effect for effect in effects if isinstance(effect, ReplicaDown)]
    assert "no progress for 4.5 s in phase stepping at step 1, decode of 8 tokens, allowed 4 s" in down.reason


def test_a_broken_stream_gets_a_moment_to_come_back() -> None:
    core = make()
    name = launch(core)
    form(core, 1.0)
    core.step(2.0, Detached(1, name))
    assert core.ranks()[1].state == "detached"
    assert core.step(3.0, Tick()) == []
    again = hello(1, name, "ready", epoch=1, resident=RESIDENT)
    assert quiet(core.step(3.1, again)) == [Tell(core.fence, 1, name, Accept())]
    core.step(4.0, Beat(0, name, "ready", 1))
    assert core.step(5.0, Tick()) == []
    core.step(5.0, Detached(1, name))
    assert PersistEpoch(2) in core.step(6.6, Tick())


def test_a_rank_that_missed_a_command_is_told_again() -> None:
    core = make()
    name = launch(core)
    core.step(1.0, hello(0, name))
    core.step(1.0, hello(1, name))
    assert Tell(core.fence, 0, name, OpenStore()) in core.step(1.1, hello(0, name))
    core.step(1.2, StoreOpened(0, name, "h:1"))
    assert Tell(core.fence, 1, name, Form("h:1", 8)) in core.step(1.3, hello(1, name))
    told = core.step(1.4, hello(1, name, "loading"))
    assert told == [Tell(core.fence, 1, name, Accept())]


def test_a_new_coordinator_adopts_ranks_that_serve_the_persisted_epoch() -> None:
    core = make(epoch=4, term=2)
    survivors = frozenset({(0, "c-4"), (1, "c-4")})
    assert quiet(core.step(0.0, Started(survivors))) == []
    core.step(0.1, hello(0, "c-4", "ready", epoch=4, resident=RESIDENT))
    effects = quiet(core.step(0.2, hello(1, "c-4", "ready", epoch=4, resident=RESIDENT)))
    assert effects == [Tell(Fence(2, 0, 4), 1, "c-4", Accept()), ReplicaUp(Fence(2, 0, 4))]
    assert core.kv_blocks == 8
    assert [rank.planned_kv_bytes for rank in core.ranks()] == [80, 80]


BOTH = frozenset({(0, "c-4"), (1, "c-4")})


def on_their_word(core: ReplicaCore) -> list[Effect]:
    """Both ranks of epoch 4 serve and say so, before Ray is joined; what the second hello leads to."""
    assert core.step(0.0, hello(0, "c-4", "ready", epoch=4, resident=RESIDENT)) == []
    return quiet(core.step(0.1, hello(1, "c-4", "ready", epoch=4, resident=RESIDENT)))


def test_ranks_that_all_serve_are_adopted_before_ray_is_joined() -> None:
    core = make(epoch=4, term=2)
    up = ReplicaUp(Fence(2, 0, 4))
    assert on_their_word(core) == [Tell(Fence(2, 0, 4), rank, "c-4", Accept()) for rank in (0, 1)] + [up]
    core.step(0.2, Tick())
    assert core.step(3.0, Started(BOTH)) == []
    assert core.state is State.READY


@pytest.mark.parametrize(
    "second",
    [
        hello(1, "c-4", "ready", epoch=3, resident=RESIDENT),
        hello(1, "c-4", "loading", epoch=4),
        hello(1, "c-4", "ready", epoch=4, resident=RESIDENT, layout="another"),
        hello(0, "c-3", "ready", epoch=4, resident=RESIDENT),
        Detached(0, "c-4"),
    ],
)
def test_nobody_is_adopted_on_the_word_of_some(second: RankEvent) -> None:
    core = make(epoch=4, term=2)
    core.step(0.0, hello(0, "c-4", "ready", epoch=4, resident=RESIDENT))
    assert core.step(0.1, second) == []
    assert core.state is State.STARTING
    if isinstance(second, Detached):
        assert core.step(0.2, hello(1, "c-4", "ready", epoch=4, resident=RESIDENT)) == []
    assert quiet(core.step(0.3, Started(frozenset({(0, "c-4")}))))[:2] == [PersistEpoch(5), Kill(5, None)]


@pytest.mark.parametrize(
    ("survivors", "suspect"), [(BOTH - {(1, "c-4")}, 1), (BOTH | {(0, "c-3")}, 0)], ids=["no agent", "two of them"]
)
def test_a_word_that_no_agent_bears_out_ends_the_epoch(survivors: frozenset[tuple[int, str]], suspect: int) -> None:
    core = make(epoch=4, term=2)
    on_their_word(core)
    effects = quiet(core.step(3.0, Started(survivors)))
    assert [type(effect) for effect in effects] == [PersistEpoch, ReplicaDown, Kill]
    assert effects[-1] == Kill(5, suspect)


def test_what_comes_after_a_word_waits_until_ray_is_joined() -> None:
    """A rank of an earlier, larger layout is of use again; a stranger is not."""
    core = make(epoch=4, term=2)
    on_their_word(core)
    assert core.step(1.0, hello(2, "c-2")) == []
    assert core.step(1.1, hello(1, "c-3")) == []
    told = core.step(3.0, Started(BOTH | {(2, "c-2")}))
    assert Tell(Fence(2, 0, 4), 2, "c-2", Accept()) in told
    assert any(isinstance(tell, Tell) and isinstance(tell.command, Refuse) for tell in told)
    assert core.state is State.READY


def test_heartbeats_are_not_kept_until_ray_is_joined() -> None:
    """That may take hours, where it is another's."""
    core = make(epoch=4, term=2)
    core.step(0.0, hello(0, "c-4", "ready", epoch=4, resident=RESIDENT))
    for step in range(50):
        assert core.step(0.1 * step, Beat(0, "c-4", "stepping", step)) == []
    assert [type(event) for event in core._early.take()] == [Attached]


def test_a_rank_that_is_lost_before_ray_is_joined_is_replaced_after() -> None:
    core = make(epoch=4, term=2)
    on_their_word(core)
    core.step(0.5, Detached(1, "c-4"))
    assert Kill(5, 1) in core.step(2.1, Tick())
    assert core.step(3.0, Started(frozenset({(0, "c-4")}))) == []
    assert Launch(0, "c-5") in core.step(3.1, Killed(5))


@pytest.mark.parametrize(
    "survivors", [frozenset(), frozenset({(0, "c-4")}), frozenset({(0, "c-3"), (0, "c-4"), (1, "c-4")})]
)
def test_a_replica_with_a_rank_missing_is_not_waited_for(survivors: frozenset[tuple[int, str]]) -> None:
    core = make(epoch=4, term=2)
    assert quiet(core.step(0.0, Started(survivors))) == [PersistEpoch(5), Kill(5, None)]


def test_survivors_that_do_not_serve_or_do_not_come_are_replaced() -> None:
    survivors = frozenset({(0, "c-4"), (1, "c-4")})
    core = make(epoch=4, term=2)
    core.step(0.0, Started(survivors))
    assert Kill(5, suspect=1) in core.step(0.1, hello(1, "c-4", "loading", epoch=4))
    core = make(epoch=4, term=2)
    core.step(0.0, Started(survivors))
    core.step(0.1, hello(0, "c-4", "ready", epoch=4, resident=RESIDENT))
    core.step(9.0, Beat(0, "c-4", "ready", 1))
    assert core.step(9.5, Tick()) == []
    core.step(9.9, Beat(0, "c-4", "ready", 1))
    assert Kill(5, suspect=1) in core.step(10.1, Tick())


def test_a_rank_that_comes_back_before_it_forms_is_told_again() -> None:
    core = make()
    name = launch(core)
    core.step(1.0, hello(1, name))
    core.step(1.0, hello(0, name))

    def told_again(rank: int, phase: str) -> list[object]:
        effects = core.step(1.0, hello(rank, name, phase))
        assert effects[0] == Tell(core.fence, rank, name, Accept())
        assert all(isinstance(tell, Tell) and (tell.rank, tell.incarnation) == (rank, name) for tell in effects)
        return [tell.command for tell in effects[1:] if isinstance(tell, Tell)]

    assert told_again(0, "waiting") == [OpenStore()]
    assert told_again(0, "store") == [OpenStore()], "its answer may be lost; it gives the same again"
    assert told_again(1, "waiting") == []
    core.step(1.0, StoreOpened(0, name, "h:1"))
    assert told_again(0, "store") == told_again(1, "waiting") == [Form("h:1", 8)]
    assert told_again(0, "loading") == told_again(1, "loading") == []


def test_a_start_that_keeps_failing_ends_with_its_last_error() -> None:
    core = make()
    launch(core)
    now = 0.0
    for attempt in range(1, START_ATTEMPTS):
        assert PersistEpoch(attempt + 1) in core.step(now, LaunchFailed(0, core.incarnation(), "no device"))
        assert quiet(core.step(now, Killed(core.fence.epoch))) == [] or attempt == 1
        now += 10
        core.step(now, Tick())
        assert core.state is State.LAUNCHING
    effects = quiet(core.step(now, Fault(1, core.incarnation(), "waiting", "out of memory")))
    assert [type(effect) for effect in effects] == [Kill, GiveUp]
    assert isinstance(effects[1], GiveUp) and "rank 1 of replica 0: waiting: out of memory" in str(effects[1].error)
    assert core.step(now + 1, Tick()) == []


def meet(core: ReplicaCore, now: float) -> str:
    """From launched to forming; the incarnation."""
    name = core.incarnation()
    for event in (hello(0, name), hello(1, name), StoreOpened(0, name, "h:1")):
        core.step(now, event)
    assert core.state is State.FORMING
    return name


def test_a_fault_while_forming_ends_the_first_start_with_the_first_error() -> None:
    """Of what follows from it, nothing is told."""
    core = make()
    launch(core)
    name = meet(core, 1.0)
    assert core.step(2.0, Fault(1, name, "loading", "out of memory")) == []
    assert core.step(2.1, Fault(0, name, "loading", "connection closed by peer")) == []
    assert core.step(2.9, Tick()) == []
    effects = quiet(core.step(3.1, Tick()))
    assert [type(effect) for effect in effects] == [Kill, GiveUp]
    assert isinstance(effects[1], GiveUp)
    assert effects[1].error.message == "rank 1 of replica 0: loading: out of memory"


def test_a_death_while_forming_is_the_reason_of_faults_that_were_told_before_it() -> None:
    core = make()
    launch(core)
    name = meet(core, 1.0)
    core.step(2.0, Progress(1, name, 1, 2))
    assert core.step(2.0, Fault(0, name, "loading", "connection closed by peer")) == []
    effects = core.step(2.2, Died(1, name))
    assert PersistEpoch(2) in effects, "a death may be chance, and is tried again"
    lost = next(effect for effect in effects if isinstance(effect, Emit) and effect.kind == "rank.lost")
    assert lost.subject == "rank/0/1" and lost.detail["reason"] == "its process has died in phase loading"


def test_what_fails_while_forming_is_tried_again_where_ranks_have_served() -> None:
    """An earlier coordinator's, or in another layout."""
    for core in (make(epoch=3, term=2), make()):
        launch(core)
        if core.fence.term == 1:
            form(core)
            core.step(2.0, Died(1, core.incarnation()))
            core.step(2.0, Killed(core.fence.epoch))
        failed = core.fence.epoch
        name = meet(core, 3.0)
        core.step(4.0, Fault(1, name, "loading", "out of memory"))
        assert PersistEpoch(failed + 1) in core.step(5.1, Tick())
        core.step(6.0, Killed(failed + 1))
        core.step(6.0, Tick())
        core.step(12.0, Tick())
        meet(core, 12.0)
        assert core.step(14.0, Tick()) == [], "the fault was of the epoch before"


def test_a_replica_that_has_served_is_never_given_up_but_waits_between_attempts() -> None:
    core = make()
    launch(core)
    form(core, 1.0)
    now = 1.0
    for failure in range(1, 3 * START_ATTEMPTS):
        assert PersistEpoch(failure + 1) in core.step(now, LaunchFailed(0, core.incarnation(), "no device"))
        core.step(now, Killed(core.fence.epoch))
        assert (core.state is State.WAITING) == (failure > 1)
        now += backoff_s(failure)
        core.step(now, Tick())
        assert core.state is State.LAUNCHING
    assert backoff_s(100) == MAX_BACKOFF_S


def test_no_memory_for_the_cache_gives_up_at_once() -> None:
    core = make()
    name = launch(core)
    core.step(1.0, hello(0, name, memory_bytes=1))
    core.step(1.0, hello(1, name, memory_bytes=1))
    effects = core.step(1.0, StoreOpened(0, name, "h:1"))
    assert isinstance(effects[-1], GiveUp) and "no memory for the KV cache" in str(effects[-1].error)


def test_no_memory_for_the_cache_ends_no_cluster_that_serves() -> None:
    core = make()
    name = launch(core)
    core.step(0.5, StartEnded())
    for rank in (0, 1):
        core.step(1.0, hello(rank, name, memory_bytes=1))
    effects = core.step(1.0, StoreOpened(0, name, "h:1"))
    assert PersistEpoch(2) in effects, "it is tried again: what took the memory may be gone by then"
    assert not any(isinstance(effect, GiveUp) for effect in effects)


def test_ranks_that_never_attach_are_started_again() -> None:
    core = make()
    name = launch(core)
    core.step(1.0, hello(0, name))
    for now in range(1, 120, 10):
        core.step(now, Beat(0, name, "waiting", 0))
        assert core.step(now, Tick()) == []
    core.step(120.0, Beat(0, name, "waiting", 0))
    assert Kill(2, suspect=1) in core.step(120.0, Tick())


def test_the_plan_decides_the_blocks() -> None:
    assert PLAN.kv_blocks([RankMemory("n", 10_000)] * 2) == 8


def relayout(core: ReplicaCore, ranks: int, now: float = 5.0) -> list[Effect]:
    """To a plan of so many ranks; the first effects."""
    plan = replace(PLAN, degrees=Degrees(tensor=ranks), parameter_bytes=(100,) * ranks, block_bytes=(10,) * ranks)
    return quiet(core.step(now, Relayout(plan, f"over {ranks}")))


def test_another_layout_is_formed_by_the_same_processes() -> None:
    core = make()
    name = launch(core)
    form(core)
    fence = Fence(1, 0, 2)
    retire = [Tell(fence, rank, name, Retire()) for rank in (0, 1)]
    assert relayout(core, 1) == [
        PersistEpoch(2),
        ReplicaDown(Fence(1, 0, 1), ANOTHER_LAYOUT),
        *retire,
        AwaitPersisted(2),
    ]
    assert core.step(5.1, Retired(0, name, 10_000)) == []
    assert quiet(core.step(5.1, Persisted(2))) == [], "rank 1 still holds its memory"
    assert quiet(core.step(5.2, Retired(1, name, 10_000))) == [Tell(fence, 0, name, OpenStore())]
    assert core.step(5.3, StoreOpened(0, name, "h:2")) == [Tell(fence, 0, name, Form("h:2", 8))]
    assert quiet(core.step(5.4, Ready(0, name, RESIDENT))) == [ReplicaUp(fence)]
    assert [rank.pid for rank in core.ranks()] == [10]

    assert Tell(Fence(1, 0, 3), 0, name, Retire()) in relayout(core, 2, 6.0)
    core.step(6.1, Persisted(3))
    told = core.step(6.2, Retired(0, name, 10_000))
    assert Tell(Fence(1, 0, 3), 0, name, OpenStore()) in told, "rank 1 waited all the time"
    assert core.step(6.3, StoreOpened(0, name, "h:2"))[1] == Tell(Fence(1, 0, 3), 1, name, Form("h:2", 8))


def test_a_larger_layout_starts_what_it_lacks_once_its_epoch_is_on_disk() -> None:
    core = make()
    old = launch(core)
    form(core)
    assert not [effect for effect in relayout(core, 3) if isinstance(effect, Launch)]
    assert core.step(5.1, Persisted(1)) == [], "of an earlier epoch"
    assert quiet(core.step(5.1, Persisted(2))) == [Launch(2, "c-2")]
    for rank in (0, 1):
        assert core.step(5.2, Retired(rank, old, 10_000)) == []
    assert quiet(core.step(9.0, hello(2, "c-2")))[-1] == Tell(Fence(1, 0, 2), 0, old, OpenStore())


def test_a_rank_that_does_not_retire_is_killed_with_all_others() -> None:
    core = make()
    name = launch(core)
    form(core)
    relayout(core, 1)
    core.step(5.0, Persisted(2))
    core.step(5.1, Retired(0, name, 10_000))
    for now in (7.0, 9.0, 11.0, 12.9):
        core.step(now, Beat(0, name, "waiting", 0))
        core.step(now, Beat(1, name, "retiring", 0))
        assert core.step(now, Tick()) == []
    assert Kill(3, suspect=1) in core.step(13.0, Tick())
    assert quiet(core.step(13.1, Killed(3))) == [Launch(0, "c-3")], "of the new layout"


def test_a_rank_that_lost_its_stream_is_told_again_to_retire() -> None:
    core = make()
    name = launch(core)
    form(core)
    relayout(core, 2)
    fence = Fence(1, 0, 2)
    again = [Tell(fence, 1, name, Accept()), Tell(fence, 1, name, Retire())]
    assert core.step(5.1, hello(1, name, "ready", epoch=1, resident=RESIDENT)) == again
    assert core.step(5.2, hello(1, name, "retiring", epoch=2)) == again
    core.step(5.3, Persisted(2))
    core.step(5.3, Retired(0, name, 10_000))
    told = quiet(core.step(5.4, hello(1, name, "waiting", epoch=2)))
    assert told == [Tell(fence, 1, name, Accept()), Tell(fence, 0, name, OpenStore())], "it has, as its hello says"


def test_what_befalls_a_surplus_rank_disturbs_nobody() -> None:
    core = make()
    name = launch(core)
    form(core)
    relayout(core, 1)
    core.step(5.0, Persisted(2))
    for rank in (0, 1):
        core.step(5.1, Retired(rank, name, 10_000))
    core.step(5.2, StoreOpened(0, name, "h:2"))
    core.step(5.3, Ready(0, name, RESIDENT))
    (refuse,) = quiet(core.step(6.0, Died(1, name)))
    assert isinstance(refuse, Tell) and isinstance(refuse.command, Refuse)
    assert core.state is State.READY
    relayout(core, 2, 7.0)
    assert quiet(core.step(7.1, Persisted(3))) == [Launch(1, "c-3")]


def test_a_layout_that_never_served_is_given_up_and_another_may_be_tried() -> None:
    core = make()
    name = launch(core)
    form(core)
    relayout(core, 2)
    core.step(5.0, Persisted(2))
    for rank in (0, 1):
        core.step(5.1, Retired(rank, name, 1))
    kill, give_up = quiet(core.step(5.2, StoreOpened(0, name, "h:2")))
    assert kill == Kill(2, None) and isinstance(give_up, GiveUp)
    assert relayout(core, 2, 6.0) == [PersistEpoch(3), Kill(3, None)]
    assert quiet(core.step(6.1, Killed(2))) == []
    assert quiet(core.step(6.1, Killed(3))) == [Launch(0, "c-3"), Launch(1, "c-3")]


def test_what_does_not_serve_starts_over_in_the_new_layout() -> None:
    core = make()
    launch(core)
    assert relayout(core, 1) == [PersistEpoch(2), Kill(2, None)]
    assert quiet(core.step(5.1, Killed(2))) == [Launch(0, "c-2")]


def test_survivors_of_several_launches_are_adopted_if_they_serve_this_layout() -> None:
    survivors = frozenset({(0, "c-2"), (1, "c-4"), (2, "c-2")})
    for layout, adopted in (("a", True), ("b", False)):
        core = ReplicaCore(ReplicaConfig(replica=0, term=2, epoch=4, plan=PLAN, layout="a"))
        core.step(0.0, Started(survivors))
        core.step(0.1, hello(2, "c-2", "waiting"))
        first = core.step(0.1, hello(0, "c-2", "ready", epoch=4, resident=RESIDENT, layout=layout))
        effects = core.step(0.2, hello(1, "c-4", "ready", epoch=4, resident=RESIDENT, layout=layout))
        assert (ReplicaUp(Fence(2, 0, 4)) in effects) == adopted
        assert (Kill(5, 0) in first) == (not adopted)
