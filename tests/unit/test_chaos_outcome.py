"""What an injection did, read off arrivals and events: phase, detection, next tokens, recomputed tokens, the table."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echelon.chaos.compare import Verdict
from echelon.chaos.load import LATE, Heard
from echelon.chaos.matrix import document, percentile, summary, table
from echelon.chaos.outcome import (
    Outcome,
    detected_s,
    miscounted,
    next_tokens_s,
    outcomes,
    phase_hit,
    resumed_unix_s,
    wrong,
)
from echelon.chaos.plan import Injection
from echelon.chaos.victims import Target
from tests.unit.chaos_trial import PROMPT_TOKENS, cluster, event, heard, lost, rank, replayed, strike, trial

# Struck at 10: two tokens were under way, the streams go on at 13 and 14.
ONE = heard("one", [8.0, 9.0, 10.001, 13.0, 13.1, 13.2], PROMPT_TOKENS + 3)
TWO = heard("two", [8.5, 9.5, 10.002, 10.003, 14.0, 14.1], PROMPT_TOKENS + 4)
EVENTS = [
    lost(10.01),
    replayed(10.02, "one", PROMPT_TOKENS + 3),
    replayed(10.02, "two", PROMPT_TOKENS + 4),
    event(12.0, "replica.ready", "replica/0"),
]
KILLED = trial([strike(10.0)], [ONE, TWO], EVENTS)


def test_a_plain_kill() -> None:
    (told,) = outcomes(KILLED)
    assert told.detected_s == pytest.approx(0.01)
    assert [told.first_s, told.last_s] == pytest.approx([3.0, 4.0])
    assert told.recomputed_tokens == 2 * PROMPT_TOKENS + 7
    assert (told.fault, told.phase, told.aimed, told.counted) == ("kill rank", "decode", "decode", 2)
    assert wrong(KILLED) == []


def test_only_streams_with_tokens_on_both_sides_count() -> None:
    before, after = heard("before", [8.0, 9.0]), heard("after", [10.5, 13.0])
    late = heard(LATE, [9.0, 13.0])
    assert next_tokens_s(trial([strike(10.0)], [ONE, before, after, late], EVENTS)).keys() == {"one"}


def test_the_next_token_ends_the_longest_silence() -> None:
    assert resumed_unix_s(ONE.arrivals, 10.0) == 13.0
    assert resumed_unix_s(ONE.arrivals, 13.15) == 13.2
    assert resumed_unix_s(ONE.arrivals, 13.2) is None


def test_tokens_after_a_new_epoch_are_its_however_short_the_pause() -> None:
    """A later silence, of a busy machine, may be longer than the recovery."""
    slow = heard("slow", [8.0, 9.0, 10.001, 12.1, 19.0], PROMPT_TOKENS + 3)
    found = trial([strike(10.0)], [slow], [lost(10.01), replayed(10.02, "slow", PROMPT_TOKENS + 3), EVENTS[-1]])
    assert next_tokens_s(found) == {"slow": pytest.approx(2.1)}
    assert miscounted(found) == []


@given(st.lists(st.floats(0, 100), min_size=1, unique=True).map(sorted), st.floats(0, 100))
def test_nothing_resumes_before_it_is_struck(times: list[float], struck_unix_s: float) -> None:
    resumed = resumed_unix_s(heard("any", times).arrivals, struck_unix_s)
    later = [unix_s for unix_s in times if unix_s > struck_unix_s]
    assert resumed in later if later else resumed is None


@pytest.mark.parametrize(
    ("phase", "told"),
    [("waiting", "form"), ("store", "form"), ("loading", "load"), ("stepping", "decode"), ("ready", "decode")],
)
def test_the_phase_of_a_lost_rank_is_what_the_cluster_says(phase: str, told: str) -> None:
    assert phase_hit(trial([strike(10.0)], [ONE, TWO], [lost(10.01, phase)]), 0) == told


def test_a_rank_that_fell_silent_while_loading_was_struck_in_load() -> None:
    silent = event(15.0, "rank.lost", reason="silent for 5.1 s in phase loading, allowed 5 s")
    assert phase_hit(trial([strike(10.0)], [ONE], [silent]), 0) == "load"


def test_a_rank_that_had_loaded_while_others_load_was_struck_in_load() -> None:
    look = cluster([rank(0, "loading"), rank(1, "ready")], state="forming")
    second = strike(11.0, Injection("kill", "rank:1", "load"), look)
    told = [lost(10.01), lost(11.01, "ready"), event(12.0, "replica.ready", "replica/0")]
    assert phase_hit(trial([strike(10.0), second], [ONE, TWO], told), 1) == "load"
    served = event(10.9, "replica.ready", "replica/0")
    assert phase_hit(trial([strike(10.0), second], [ONE, TWO], [*told, served]), 1) == "replay", "it served meanwhile"


@pytest.mark.parametrize(("state", "told"), [("loading", "load"), ("store", "form")])
def test_of_a_coordinator_the_last_look_tells_the_phase(state: str, told: str) -> None:
    look = cluster([rank(0, state), rank(1, "waiting")], state="forming")
    injection = Injection("kill", "coordinator", "load")
    assert phase_hit(trial([strike(10.0, injection, look)], [ONE], []), 0) == told


def test_a_prompt_under_way_makes_it_prefill() -> None:
    injection = Injection("kill", "rank:1", "prefill")
    assert phase_hit(trial([strike(10.0, injection, late_waited=True)], [ONE], EVENTS), 0) == "prefill"
    assert phase_hit(trial([strike(10.0, injection)], [ONE], EVENTS), 0) == "decode", "it came too late"


def test_a_journal_s_moment_is_seen_at_its_write() -> None:
    assert phase_hit(trial([strike(10.0, Injection("kill", "coordinator", "journal"))], [ONE], []), 0) == "journal"


# Struck at 10, serving again at 12; struck again at 13.5, when stream one goes on and stream two does not yet.
AGAIN = [
    *EVENTS,
    lost(13.51),
    replayed(13.52, "one", PROMPT_TOKENS + 5),
    replayed(13.52, "two", PROMPT_TOKENS + 4),
    event(16.0, "replica.ready", "replica/0"),
]
ONE_TWICE = heard("one", [8.0, 9.0, 10.001, 13.0, 13.1, 17.0], 2 * PROMPT_TOKENS + 8)
TWO_TWICE = heard("two", [8.5, 9.5, 10.002, 10.003, 18.0, 18.1], 2 * PROMPT_TOKENS + 8)
TWICE = trial([strike(10.0), strike(13.5, Injection("stop", "rank:1", "replay"))], [ONE_TWICE, TWO_TWICE], AGAIN)


def test_a_second_strike_hits_the_replay_while_a_stream_waits() -> None:
    first, second = outcomes(TWICE)
    assert (first.phase, second.phase) == ("decode", "replay")
    assert (first.first_s, first.last_s) == (None, None), "the second strike came between"
    assert [second.first_s, second.last_s] == pytest.approx([3.5, 4.5])
    assert [first.detected_s, second.detected_s] == pytest.approx([0.01, 0.01])
    assert (first.recomputed_tokens, second.recomputed_tokens) == (2 * PROMPT_TOKENS + 7, 2 * PROMPT_TOKENS + 9)
    assert wrong(TWICE) == []


def test_after_the_last_stream_has_gone_on_it_is_no_replay_any_more() -> None:
    both = heard("two", [8.5, 9.5, 13.2, 18.0])
    assert phase_hit(replace(TWICE, heard={"one": ONE_TWICE, "two": both}), 1) == "decode"


def test_a_coordinator_is_missed_when_its_successor_begins() -> None:
    coordinator = Target("coordinator", "coordinator", (1,))
    struck = replace(strike(10.0, Injection("kill", "coordinator")), target=coordinator)
    began = [event(5.0, "coordinator.started"), lost(10.1), event(10.25, "coordinator.started")]
    assert detected_s(trial([struck], [ONE], began), 0) == pytest.approx(0.25)
    assert detected_s(trial([struck], [ONE], began[:2]), 0) is None


def test_what_nobody_missed_was_not_detected() -> None:
    assert detected_s(trial([strike(10.0)], [ONE], [event(11.0, "request.parked")]), 0) is None
    assert detected_s(trial([strike(10.0)], [ONE], [lost(9.0)]), 0) is None, "that was before"


def test_a_spare_that_is_lost_tells_of_a_struck_spare_alone() -> None:
    told = [event(10.2, "spare.lost", "rank/0/1"), lost(10.3)]
    spare = replace(strike(10.0), target=Target("spare", "spare 7", (7,)))
    assert detected_s(trial([strike(10.0)], [ONE], told), 0) == pytest.approx(0.3)
    assert detected_s(trial([spare], [ONE], told), 0) == pytest.approx(0.2)
    assert next_tokens_s(trial([spare], [ONE], told)) == {"one": pytest.approx(0.001)}, "nobody waits for it"


@pytest.mark.parametrize(
    ("stream", "told"),
    [
        (heard("one", [8.0, 9.0, 13.0], PROMPT_TOKENS + 3), "one: recomputed 10, told .10., prompt and delivered .9."),
        (heard("one", [8.0, 9.0, 10.001, 13.0], PROMPT_TOKENS + 4), "one: recomputed 11, told.*10"),
        (heard("one", [8.0, 9.0, 10.001, 13.0], 0), "one: recomputed 0, told"),
    ],
)
def test_more_or_less_than_prompt_and_delivered_is_wrong(stream: Heard, told: str) -> None:
    found = trial([strike(10.0)], [stream], EVENTS)
    (line,) = miscounted(found)
    assert re.search(told, line), line
    assert len(wrong(found)) == 1


def test_an_interruption_that_two_coordinators_tell_counts_once() -> None:
    """And what the first wrote and did not deliver was no client's."""
    struck = replace(strike(11.0, Injection("kill", "coordinator")), target=Target("coordinator", "coordinator", (1,)))
    told = [*EVENTS, replayed(12.5, "one", PROMPT_TOKENS + 3), replayed(12.5, "two", PROMPT_TOKENS + 4)]
    assert miscounted(trial([strike(10.0), struck], [ONE, TWO], told)) == []
    more = heard("one", [8.0, 9.0, 13.0], 2 * PROMPT_TOKENS + 7)
    assert len(miscounted(trial([strike(10.0), struck], [more], told))) == 1
    less = heard("one", [8.0, 9.0, 13.0], PROMPT_TOKENS + 2)
    assert len(miscounted(trial([strike(10.0), struck], [less], told))) == 1
    assert len(miscounted(trial([strike(10.0), strike(11.0)], [ONE, TWO], told))) == 2, "nobody else tells twice"


def test_every_difference_is_told_with_its_injection() -> None:
    verdicts = {"one": Verdict(2, 1, ("it failed: gone",)), "two": Verdict()}
    assert wrong(replace(KILLED, verdicts=verdicts)) == [
        f"kill rank:1 in decode (rank 0/0/0/1): one: {what}"
        for what in ("it failed: gone", "2 tokens lost", "1 tokens doubled")
    ]


# The matrix.


def made(fault: str, phase: str, detected: float | None, waits: tuple[float, float] | None, tokens: int) -> Outcome:
    first, last = waits or (None, None)
    return Outcome(
        fault=fault,
        phase=phase,
        aimed="decode",
        detected_s=detected,
        first_s=first,
        last_s=last,
        recomputed_tokens=tokens,
        counted=16,
        lost=0,
        doubled=0,
    )


FOUND = [
    made("kill rank", "replay", 0.01, (2.0, 3.0), 900),
    made("kill rank", "decode", 0.02, (2.0, 2.5), 800),
    made("kill rank", "decode", 0.01, (2.2, 9.0), 600),
    made("kill rank", "decode", 0.09, None, 700),
    made("kill coordinator", "journal", 0.25, (3.0, 3.1), 0),
]


def test_a_row_for_each_fault_and_phase() -> None:
    rows = table(FOUND).splitlines()
    assert rows[0].startswith("| fault | phase | injections | detected ms |")
    assert rows[2:] == [
        "| kill coordinator | journal | 1 | 250 | 3000 | 3100 | 0 | 0 | 0 |",
        "| kill rank | decode | 3 | 20 / 90 | 2100 / 2200 | 5750 / 9000 | 700 / 800 | 0 | 0 |",
        "| kill rank | replay | 1 | 10 | 2000 | 3000 | 900 | 0 | 0 |",
    ]
    assert {row.count("|") for row in rows} == {10}


def test_the_summary_counts_all() -> None:
    told = summary([*FOUND, replace(FOUND[1], lost=2, doubled=1)])
    assert told.startswith(
        "6 injections, 2 of which hit another phase than they were aimed at: 2 tokens lost, 1 doubled"
    )
    assert told.endswith("after 9000 ms at worst.")


@pytest.mark.parametrize(
    ("many", "slowest"),
    [(99, "9900 ms at worst."), (100, "9900 ms at p99, 10000 ms at worst."), (1, "100 ms at worst.")],
)
def test_a_percentile_is_told_of_as_many_as_it_takes(many: int, slowest: str) -> None:
    assert summary([replace(FOUND[1], last_s=(n + 1) / 10) for n in range(many)]).endswith(f"came after {slowest}")


def test_a_document_says_what_it_was_measured_on_and_what_differed() -> None:
    told = document("Fault matrix", {"date": "today"}, FOUND, ["one: 2 tokens lost"])
    assert told.startswith("# Fault matrix\n\n- date: today\n\n| fault")
    assert told.endswith("## What differed\n- one: 2 tokens lost\n")
    assert "differed" not in document("Fault matrix", {}, FOUND, [])


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1.0))
def test_a_percentile_is_a_value_that_the_share_does_not_exceed(values: list[float], share: float) -> None:
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values)
    assert sum(value < found for value in values) < share * len(values)
