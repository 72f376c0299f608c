"""SupervisorCore: who is started, replaced and ended, and with which exit code."""

from __future__ import annotations

import signal

import pytest

from coordinator.supervisor.core import (
    BEAT_TIMEOUT_S,
    CLEAN_UP_S,
    FIRST_BEAT_TIMEOUT_S,
    HURRY_S,
    MAX_DEATHS,
    MAX_RAY_FAILURES,
    SupervisorCore,
)
from coordinator.supervisor.events import (
    Begin,
    ConfigurationRead,
    ConfigurationRefused,
    CoordinatorEnded,
    Exit,
    PrepareSuccessor,
    RayEnded,
    RayFailed,
    RayUp,
    ReadConfiguration,
    SendConfiguration,
    ShowLoading,
    ShowReady,
    SignalCoordinator,
    Signalled,
    StartCoordinator,
    StartRay,
    TakeConfiguration,
    Tick,
    Told,
    Warn,
)

KILL = SignalCoordinator(signal.SIGKILL)
TERM = SignalCoordinator(signal.SIGTERM)


def running(owns_ray: bool = True) -> SupervisorCore:
    core = SupervisorCore(owns_ray, drain_timeout_s=30.0)
    core.step(0.0, Begin())
    if owns_ray:
        core.step(0.0, RayUp())
    core.step(0.0, Told({"beat": 0}))
    return core


def test_ray_comes_first_unless_it_is_joined() -> None:
    core = SupervisorCore(owns_ray=True, drain_timeout_s=30.0)
    assert core.step(0.0, Begin()) == [StartRay()]
    assert core.step(1.0, RayUp()) == [StartCoordinator()]
    assert SupervisorCore(owns_ray=False, drain_timeout_s=30.0).step(0.0, Begin()) == [StartCoordinator()]


def test_a_ray_that_does_not_start_ends_it_with_its_message() -> None:
    core = SupervisorCore(owns_ray=True, drain_timeout_s=30.0)
    core.step(0.0, Begin())
    assert core.step(1.0, RayFailed("boom")) == [Exit(1, "boom")]


def test_ready_is_shown_once_for_all_coordinators() -> None:
    core = running()
    assert core.step(1.0, Told({"loading": {"loaded_bytes": 1, "total_bytes": 2}})) == [ShowLoading(1, 2)]
    assert core.step(1.0, Told({"ready": "h:1"})) == [ShowReady("h:1"), PrepareSuccessor()]
    core.step(2.0, CoordinatorEnded(-9))
    assert core.step(3.0, Told({"ready": "h:1"})) == [PrepareSuccessor()]


def test_a_dead_coordinator_is_replaced_and_one_that_keeps_dying_ends_it() -> None:
    core = running()
    for death in range(MAX_DEATHS - 1):
        warning, start = core.step(10.0 + death, CoordinatorEnded(-9))
        assert isinstance(warning, Warn) and "SIGKILL" in warning.message
        assert start == StartCoordinator()
    (end,) = core.step(60.0, CoordinatorEnded(1))
    assert (
        isinstance(end, Exit)
        and end.code == 1
        and "5 times within 60 s" in end.message
        and "exit code 1" in end.message
    )


def test_old_deaths_are_forgotten() -> None:
    core = running()
    for death in range(3 * MAX_DEATHS):
        assert StartCoordinator() in core.step(20.0 * death, CoordinatorEnded(1))


def test_silence_is_a_death_but_not_while_the_supervisor_itself_stood_still() -> None:
    core = running()
    assert core.step(BEAT_TIMEOUT_S - 0.1, Tick()) == []
    assert core.step(1000.0, Tick(lag_s=1001.0 - BEAT_TIMEOUT_S)) == []
    core.step(1000.0, Told({"beat": 1}))
    assert core.step(1000.0 + BEAT_TIMEOUT_S, Tick()) == [KILL]
    warning, start = core.step(1016.0, CoordinatorEnded(-9))
    assert isinstance(warning, Warn) and "no sign of life" in warning.message and start == StartCoordinator()


def test_a_new_coordinator_may_take_longer_to_its_first_beat() -> None:
    core = SupervisorCore(owns_ray=False, drain_timeout_s=30.0)
    core.step(0.0, Begin())
    core.step(1.0, Told({"waiting": True}))  # for its configuration; then it reads files
    assert core.step(FIRST_BEAT_TIMEOUT_S - 1, Tick()) == []
    assert core.step(FIRST_BEAT_TIMEOUT_S, Tick()) == [KILL]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_drains_and_a_second_one_hurries(number: int, code: int) -> None:
    core = running()
    assert core.step(1.0, Signalled(number)) == [TERM]
    assert core.step(30.0 + CLEAN_UP_S, Tick()) == []
    assert core.step(2.0, Signalled(number)) == [TERM]
    assert core.step(2.0 + HURRY_S, Tick()) == [KILL]
    assert core.step(12.5, CoordinatorEnded(-9)) == [Exit(code)]


def test_a_drain_that_never_ends_is_ended() -> None:
    core = running()
    core.step(1.0, Signalled(signal.SIGTERM))
    assert core.step(31.0 + CLEAN_UP_S, Tick()) == [KILL]


def test_a_signal_before_there_is_a_coordinator_leaves_at_once() -> None:
    core = SupervisorCore(owns_ray=True, drain_timeout_s=30.0)
    core.step(0.0, Begin())
    assert core.step(1.0, Signalled(signal.SIGINT)) == [Exit(130)]


def test_a_failure_is_told_once_the_coordinator_has_cleaned_up() -> None:
    core = running()
    assert core.step(1.0, Told({"failed": "no memory"})) == []
    assert core.step(2.0, Tick()) == []
    assert core.step(3.0, CoordinatorEnded(1)) == [Exit(1, "no memory")]


def test_a_hand_over_starts_a_successor_and_counts_as_no_death() -> None:
    core = running()
    for turn in range(2 * MAX_DEATHS):
        assert core.step(float(turn), Signalled(signal.SIGHUP)) == [SignalCoordinator(signal.SIGHUP)]
        assert core.step(float(turn), CoordinatorEnded(0)) == [StartCoordinator()]
    core.step(50.0, Signalled(signal.SIGHUP))
    assert core.step(50.0 + BEAT_TIMEOUT_S, Tick()) == [KILL], "one that does not leave is killed"
    assert core.step(66.0, CoordinatorEnded(-9)) == [StartCoordinator()]


def test_a_ray_that_ends_takes_the_coordinator_along_and_both_start_again() -> None:
    core = running()
    assert core.step(1.0, RayEnded()) == [KILL]
    warning, start = core.step(1.1, CoordinatorEnded(-9))
    assert isinstance(warning, Warn) and "Ray has ended" in warning.message and start == StartRay()
    assert core.step(5.0, RayUp()) == [StartCoordinator()]


def test_a_ray_of_ours_that_does_not_answer_is_replaced_like_one_that_ended() -> None:
    core = running()
    assert core.step(1.0, Told({"ray_lost": "it does not answer"})) == [KILL]
    warning, start = core.step(1.1, CoordinatorEnded(-9))
    assert warning == Warn("the coordinator is replaced: it does not answer") and start == StartRay()


def test_a_ray_that_served_is_started_again_when_its_start_fails_but_not_for_ever() -> None:
    core = running()
    core.step(1.0, Told({"ready": "h:1"}))
    core.step(2.0, RayEnded("Ray's raylet has ended"))
    core.step(2.1, CoordinatorEnded(-9))
    for _ in range(MAX_RAY_FAILURES - 1):
        assert core.step(60.0, RayFailed("busy")) == [Warn("Ray is started once more: busy"), StartRay()]
    assert core.step(70.0, RayUp()) == [StartCoordinator(served=True)], "which is not to fail for good"
    core.step(80.0, RayEnded())
    core.step(80.1, CoordinatorEnded(-9))
    for _ in range(MAX_RAY_FAILURES - 1):
        core.step(140.0, RayFailed("busy"))
    assert core.step(200.0, RayFailed("busy")) == [Exit(1, "busy")]


def test_a_ray_of_another_is_waited_for_and_told_of_once() -> None:
    """However often the coordinator dies of it meanwhile."""
    core = running(owns_ray=False)
    assert core.step(1.0, Told({"ray_lost": "Ray is away"})) == [Warn("Ray is away")]
    assert core.step(2.0, Told({"ray_lost": "Ray is away"})) == []
    for death in range(2 * MAX_DEATHS):
        warning, start = core.step(3.0 + death, CoordinatorEnded(-6))
        assert isinstance(warning, Warn) and start == StartCoordinator()
    assert core.step(30.0, Told({"ray_back": "h:6379"})) == [Warn("Ray at h:6379 is back")]
    assert core.step(31.0, Told({"ray_back": "h:6379"})) == []
    deaths = [core.step(32.0 + death, CoordinatorEnded(-6)) for death in range(MAX_DEATHS)]
    assert isinstance(deaths[-1][0], Exit), "with Ray back deaths count again"


def test_nothing_is_started_while_stopping() -> None:
    core = running()
    core.step(1.0, Signalled(signal.SIGTERM))
    assert core.step(1.1, RayEnded()) == []
    assert core.step(1.2, Told({"failed": "late"})) == []
    assert core.step(1.3, CoordinatorEnded(1)) == [Exit(0)]


def sent() -> SupervisorCore:
    """A change of configuration has been read and told to the coordinator."""
    core = SupervisorCore(False, drain_timeout_s=30.0, reads=True)
    core.step(0.0, Begin())
    assert core.step(1.0, Signalled(signal.SIGHUP)) == [ReadConfiguration()]
    assert core.step(1.1, ConfigurationRead(changed=True)) == [SendConfiguration()]
    return core


def test_a_changed_configuration_is_taken_once_the_coordinator_begins_with_it() -> None:
    core = sent()
    assert core.step(1.1, Signalled(signal.SIGHUP)) == [Warn("not reconfigured: the last change is still under way")]
    assert core.step(1.2, Told({"reconfiguring": True})) == [TakeConfiguration(read=True)]
    assert core.step(1.3, Told({"reconfigured": True})) == [Warn("reconfigured")]
    assert core.step(2.0, Signalled(signal.SIGHUP)) == [ReadConfiguration()]


def test_the_same_configuration_again_hands_over() -> None:
    core = SupervisorCore(False, drain_timeout_s=30.0, reads=True)
    core.step(0.0, Begin())
    core.step(1.0, Signalled(signal.SIGHUP))
    assert core.step(1.1, ConfigurationRead(changed=False)) == [SignalCoordinator(signal.SIGHUP)]
    assert core.step(1.2, CoordinatorEnded(0)) == [StartCoordinator()]


def test_a_refused_change_is_told_and_changes_nothing() -> None:
    core = SupervisorCore(False, drain_timeout_s=30.0, reads=True)
    core.step(0.0, Begin())
    core.step(1.0, Signalled(signal.SIGHUP))
    assert core.step(1.1, ConfigurationRefused("no such key")) == [Warn("not reconfigured: no such key")]
    core = sent()
    assert core.step(1.2, Told({"not_reconfigured": "busy"})) == [Warn("not reconfigured: busy")]
    core = sent()
    core.step(1.2, Told({"reconfiguring": True}))
    taken_back = [TakeConfiguration(read=False), Warn("not reconfigured: no memory")]
    assert core.step(1.3, Told({"not_reconfigured": "no memory"})) == taken_back


def test_a_coordinator_that_dies_in_a_change_has_begun_it_or_not() -> None:
    core = sent()
    effects = core.step(1.2, CoordinatorEnded(-9))
    assert effects[0] == Warn("not reconfigured: the coordinator ended meanwhile")
    assert effects[-1] == StartCoordinator()
    core = sent()
    core.step(1.2, Told({"reconfiguring": True}))
    core.step(1.2, CoordinatorEnded(-9))
    assert Warn("reconfigured") in core.step(9.0, Told({"ready": "h:1"})), "its successor serves the change"


def test_what_is_read_while_it_stops_is_forgotten() -> None:
    core = SupervisorCore(False, drain_timeout_s=30.0, reads=True)
    core.step(0.0, Begin())
    core.step(1.0, Signalled(signal.SIGHUP))
    core.step(1.1, Signalled(signal.SIGTERM))
    assert core.step(1.2, ConfigurationRead(changed=True)) == []
