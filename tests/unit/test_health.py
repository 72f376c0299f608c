"""Health: silence, standstill and detachment are judged apart, by phase."""

from __future__ import annotations

import pytest

from coordinator.replica.health import STEPPING, HealthLimits, Observation, judge

LIMITS = HealthLimits(heartbeat_s=0.5)


@pytest.mark.parametrize(
    ("seen", "now", "expected"),
    [
        (Observation("ready", 3, heard_s=100.0, moved_s=0.0), 104.9, ""),
        (Observation("ready", 3, heard_s=100.0, moved_s=0.0), 105.1, "silent for 5.1 s in phase ready"),
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
