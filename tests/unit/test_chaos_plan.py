"""Plans of faults: what is read and drawn, what is refused and how, when a moment has come."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from echelon.chaos.moments import ORDER, RECOVERY, reached, wait_for
from echelon.chaos.plan import FAULTS, Injection, draw_plan, in_rounds, parse_plan, unfit
from echelon.errors import ConfigError, UnavailableError
from echelon.types import Cluster
from tests.unit.chaos_trial import cluster, rank

VICTIMS = ["rank", "rank:3", "leader", "coordinator", "spare", "node:1", "gcs"]


def test_a_recovery_s_moments_go_with_the_injection_before_them() -> None:
    content = [
        {"fault": "kill", "victim": "rank:1", "when": "prefill"},
        {"fault": "stop", "victim": "leader", "when": "load"},
        {"fault": "kill", "victim": "leader", "when": "replay"},
        {"fault": "kill", "victim": "coordinator"},
    ]
    first = (
        Injection("kill", "rank:1", "prefill"),
        Injection("stop", "leader", "load"),
        Injection("kill", "leader", "replay"),
    )
    assert parse_plan(content) == (first, (Injection("kill", "coordinator", "decode"),))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "must be a list"),
        ([], "must be a list"),
        ({"fault": "kill"}, "must be a list"),
        (["kill"], "entry 1: must have the keys fault, victim, when"),
        ([{"fault": "kill"}], "entry 1: must have the keys"),
        ([{"fault": "kill", "victim": "rank", "at": 3}], "entry 1: must have the keys"),
        ([{"fault": "burn", "victim": "rank"}], "entry 1: fault must be one of kill, stop, partition, got 'burn'"),
        ([{"fault": "kill", "victim": "rank", "when": "noon"}], "when must be one of prefill, decode"),
        ([{"fault": "kill", "victim": "client"}], "entry 1: victim must be rank, rank:N"),
        ([{"fault": "kill", "victim": "leader:1"}], "entry 1: victim must be"),
        ([{"fault": "kill", "victim": "rank:x"}], "entry 1: victim must be"),
        (
            [{"fault": "kill", "victim": "rank"}, {"fault": "kill", "victim": "rank", "when": "journal"}],
            "entry 2.*journal",
        ),
        ([{"fault": "stop", "victim": "supervisor"}], "nobody replaces the supervisor"),
        ([{"fault": "kill", "victim": "rank", "when": "load"}], "moment of a recovery; put the injection"),
    ],
)
def test_a_bad_plan_is_told_by_entry(content: object, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as raised:
        parse_plan(content)
    assert raised.value.field == "plan"


def test_a_seed_draws_the_same_plan_and_another_another() -> None:
    drawn = [draw_plan(seed, 40, FAULTS, VICTIMS, ORDER) for seed in (5, 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_drawn_is_as_many_and_makes_sense(seed: int) -> None:
    rounds = draw_plan(seed, 30, FAULTS, VICTIMS, ORDER)
    flat = [injection for injections in rounds for injection in injections]
    assert len(flat) == 30
    assert in_rounds(flat) == rounds
    assert not any(map(unfit, flat))
    assert all(injections[0].when not in RECOVERY for injections in rounds)


def test_every_kind_is_drawn_sooner_or_later() -> None:
    flat = {injection for injections in draw_plan(0, 3000, FAULTS, VICTIMS, ORDER) for injection in injections}
    everything = {Injection(fault, victim, when) for fault in FAULTS for victim in VICTIMS for when in ORDER}
    assert flat == {injection for injection in everything if not unfit(injection)}


@pytest.mark.parametrize(
    ("faults", "victims", "moments", "field"),
    [
        (["burn"], ["rank"], ["decode"], "faults"),
        (["kill"], ["rank"], ["noon"], "moments"),
        (["kill"], ["me"], ["decode"], "victims"),
        (["kill"], ["rank"], ["journal"], "victims"),
        ([], ["rank"], ["decode"], "victims"),
        (["kill"], ["rank"], ["load"], "injections"),
    ],
)
def test_what_cannot_be_drawn_is_refused(faults: list[str], victims: list[str], moments: list[str], field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        draw_plan(0, 1, faults, victims, moments)
    assert raised.value.field == field


BEFORE = cluster(prefill_chunks=4, decode_rows=9, replayed_requests=1)


@pytest.mark.parametrize(
    ("now", "moments"),
    [
        (BEFORE, set()),
        (cluster(prefill_chunks=5, decode_rows=9, replayed_requests=1), {"prefill"}),
        (cluster(prefill_chunks=4, decode_rows=12, replayed_requests=1), {"decode"}),
        (cluster(prefill_chunks=4, decode_rows=12, replayed_requests=2), {"decode", "replay"}),
        # Of a new epoch every step has run since: it counts from nothing.
        (cluster(epoch=2, prefill_chunks=1, decode_rows=0, replayed_requests=1), {"prefill", "replay"}),
        (cluster(epoch=2), set()),
        (cluster([], state="fencing", epoch=2), set()),
        (cluster([], state="fencing", epoch=2, prefill_chunks=5, decode_rows=12, replayed_requests=2), set()),
        (cluster([], state="launching", epoch=2), set()),
        (cluster([rank(0, "waiting")], state="launching", epoch=2), {"form"}),
        (cluster([rank(0, "waiting"), rank(1, "store")], state="forming", epoch=2), {"form"}),
        (cluster([rank(0, "loading"), rank(1, "store")], state="forming", epoch=2), {"form", "load"}),
        (cluster([rank(0, "loading"), rank(1, "loading")], state="ready"), set()),
    ],
)
def test_a_moment_has_come_between_two_looks(now: Cluster, moments: set[str]) -> None:
    assert {moment for moment in ORDER if reached(moment, BEFORE, now)} == moments


def test_a_coordinator_that_is_away_is_looked_for_again() -> None:
    looks: Iterator[Cluster | UnavailableError] = iter(
        [BEFORE, UnavailableError("away"), UnavailableError("away"), cluster(decode_rows=1, epoch=2)]
    )

    def look() -> Cluster:
        seen = next(looks)
        if isinstance(seen, UnavailableError):
            raise seen
        return seen

    assert wait_for("decode", look, BEFORE, timeout_s=10.0, pause_s=0.0).replicas[0].epoch == 2


def test_a_moment_that_does_not_come_is_told() -> None:
    with pytest.raises(TimeoutError, match=r"waited 0\.01 s for load"):
        wait_for("load", lambda: BEFORE, BEFORE, timeout_s=0.01)
