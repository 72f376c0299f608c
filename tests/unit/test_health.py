"""Health: silence, standstill and detachment are judged apart, by phase; a step by how long its kind takes."""

from __future__ import annotations

import pytest

from coordinator.replica.health import COMPILING, STEPPING, HealthLimits, Observation, first_unfit, judge

LIMITS = HealthLimits(heartbeat_s=0.5)


@pytest.mark.parametrize(
    ("seen", "now", "expected"),
    [
        (Observation("ready", 3, heard_s=100.0, moved_s=0.0), 102.9, ""),
        (Observation("ready", 3, heard_s=100.0, moved_s=0.0), 103.1, "silent for 3.1 s in phase ready"),
        (Observation(STEPPING, 3, heard_s=100.0, moved_s=100.0), 103.1, "silent for 3.1 s in phase stepping"),
        (Observation(COMPILING, 3, heard_s=100.0, moved_s=100.0), 120.0, ""),
        (Observation("loading", 0, heard_s=100.0, moved_s=100.0), 124.0, ""),
        (Observation("loading", 0, heard_s=100.0, moved_s=100.0), 126.0, "silent for 26.0 s in phase loading"),
        (Observation("loading", 0, heard_s=300.0, moved_s=100.0), 300.0, "no progress for 200.0 s"),
        (
            Observation(STEPPING, 7, heard_s=200.0, moved_s=139.0),
            200.0,
            "for 61.0 s in phase stepping at step 7",
        ),
        (Observation("unheard-of", 7, heard_s=100.0, moved_s=100.0), 200.0, "silent"),
        (Observation("ready", 3, heard_s=0.0, moved_s=0.0, detached_s=100.0), 101.4, ""),
        (Observation("ready", 3, heard_s=0.0, moved_s=0.0, detached_s=100.0), 101.6, "detached for 1.6 s"),
    ],
)
def test_judgement(seen: Observation, now: float, expected: str) -> None:
    healthy, reason = judge(now, seen, LIMITS)
    assert healthy == (expected == "")
    assert expected in reason


def test_slow_heartbeats_are_no_silence() -> None:
    seen = Observation("ready", 0, heard_s=0.0, moved_s=0.0)
    assert judge(50.0, seen, HealthLimits(heartbeat_s=10.0))[0]
    assert not judge(61.0, seen, HealthLimits(heartbeat_s=10.0))[0]


def stepping(slowest_s: float, moved_s: float = 100.0, heard_s: float = 200.0, step: int = 7) -> Observation:
    return Observation(STEPPING, step, heard_s, moved_s, None, "decode of 8 tokens", slowest_s)


@pytest.mark.parametrize(
    ("slowest_s", "stood_s", "expected"),
    [
        (0.0, 59.0, ""),  # never measured: it may compile
        (0.0, 61.0, "no progress for 61.0 s in phase stepping at step 7, decode of 8 tokens, allowed 60 s"),
        (0.01, 2.9, ""),
        (0.01, 3.1, "no progress for 3.1 s in phase stepping at step 7, decode of 8 tokens, allowed 3 s"),
        (0.5, 9.9, ""),
        (0.5, 10.1, "allowed 10 s"),
        (5.0, 99.0, ""),  # slow, and known to be
    ],
)
def test_a_step_may_take_twenty_times_what_its_kind_takes(slowest_s: float, stood_s: float, expected: str) -> None:
    healthy, reason = judge(200.0, stepping(slowest_s, moved_s=200.0 - stood_s), LIMITS)
    assert healthy == (expected == "")
    assert expected in reason


def test_who_waits_for_a_stopped_rank_is_not_to_blame() -> None:
    """Rank 0 stands still longer than it may; rank 1 is not silent for long enough to be found by itself."""
    ranks = {0: stepping(0.01, moved_s=196.9), 1: stepping(0.01, moved_s=197.5, heard_s=197.5)}
    found = first_unfit(200.0, ranks, LIMITS)
    assert found is not None and found[0] == 1
    assert "unheard for 2.5 s while rank 0 waits: no progress for 3.1 s" in found[1]
    ranks[1] = stepping(0.01, moved_s=196.9, heard_s=199.6)
    assert (found := first_unfit(200.0, ranks, LIMITS)) and found[0] == 0, "nobody has missed a heartbeat"


def test_of_ranks_that_all_stand_still_the_one_furthest_behind_is_to_blame() -> None:
    ranks = {0: stepping(0.01, step=9), 1: stepping(0.01, step=9), 2: stepping(0.01, step=8), 3: stepping(0.01)}
    ranks[3] = stepping(0.01, step=9)
    assert (found := first_unfit(200.0, ranks, LIMITS)) and found[0] == 2


def test_nobody_else_is_blamed_for_a_rank_that_loads_too_slowly() -> None:
    ranks = {0: Observation("ready", 0, 200.0, 100.0), 1: Observation("store", 0, 200.0, moved_s=139.0)}
    assert (found := first_unfit(200.0, ranks, LIMITS)) and found[0] == 1


def test_of_silent_ranks_the_longest_silent_is_to_blame() -> None:
    ranks = {0: stepping(0.0, heard_s=196.8), 1: stepping(0.0, heard_s=196.5), 2: stepping(0.0)}
    assert (found := first_unfit(200.0, ranks, LIMITS)) and found[0] == 1


def test_nobody_is_blamed_for_waiting_for_a_rank_that_compiles() -> None:
    compiling = Observation(COMPILING, 7, heard_s=190.0, moved_s=190.0)
    ranks = {0: stepping(0.01, moved_s=190.0), 1: compiling}
    assert first_unfit(200.0, ranks, LIMITS) is None
    ranks[0] = stepping(0.01, moved_s=190.0, heard_s=196.0)
    assert (found := first_unfit(200.0, ranks, LIMITS)) and found[0] == 0, "a silence has other reasons"
    late = Observation(COMPILING, 7, heard_s=170.0, moved_s=170.0)
    assert (found := first_unfit(200.0, {0: stepping(0.01), 1: late}, LIMITS)) and found[0] == 1


def test_slow_heartbeats_are_no_standstill() -> None:
    seen = stepping(0.01, moved_s=180.0)
    assert judge(200.0, seen, HealthLimits(heartbeat_s=5.0))[0]
    assert not judge(211.0, seen, HealthLimits(heartbeat_s=5.0))[0]
