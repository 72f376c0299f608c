"""Trials as the runner would bring them back, made up: clusters, streams with their arrivals, strikes, events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from echelon.chaos.compare import Verdict
from echelon.chaos.load import Arrival, Heard
from echelon.chaos.outcome import Strike, Trial
from echelon.chaos.plan import Injection
from echelon.chaos.victims import Target
from echelon.types import (
    Choice,
    Cluster,
    ClusterEvent,
    Completion,
    FinishReason,
    Rank,
    Replica,
    StreamEvent,
    TokenLogprob,
    Usage,
)

PROMPT_TOKENS = 7
COORDINATOR = 4000


def rank(number: int = 0, state: str = "stepping", epoch: int = 1, replica: int = 0) -> Rank:
    return Rank(
        replica=replica,
        pipeline=0,
        data=0,
        tensor=number,
        expert=0,
        leader=number == 0,
        pid=100 * epoch + 10 * replica + number,
        node_id=f"node-{number}",
        epoch=epoch,
        state=state,
    )


def cluster(ranks: Sequence[Rank] | None = None, state: str = "ready", epoch: int = 1, **counters: int) -> Cluster:
    found = (rank(0, epoch=epoch), rank(1, epoch=epoch)) if ranks is None else tuple(ranks)
    replica = Replica(
        index=0, epoch=epoch, state=state, kv_blocks_total=9, kv_blocks_referenced=0, step=1, counters=counters
    )
    return Cluster(
        version="0",
        term=1,
        coordinator_pid=COORDINATOR,
        queued=0,
        running=0,
        parked=0,
        models=(),
        replicas=(replica,),
        ranks=found,
    )


def strike(
    unix_s: float, injection: Injection | None = None, look: Cluster | None = None, late_waited: bool = False
) -> Strike:
    target = Target("rank", "rank 0/0/0/1", (101,))
    injection = injection or Injection("kill", "rank:1")
    return Strike(injection=injection, target=target, unix_s=unix_s, look=look or cluster(), late_waited=late_waited)


def event(unix_s: float, kind: str, subject: str = "rank/0/1", **detail: object) -> ClusterEvent:
    return ClusterEvent(round(unix_s * 1000), unix_s, kind, subject, detail)


def lost(unix_s: float, phase: str = "stepping") -> ClusterEvent:
    return event(unix_s, "rank.lost", epoch=1, reason=f"its process has died in phase {phase}")


def replayed(unix_s: float, name: str, tokens: int) -> ClusterEvent:
    return event(unix_s, "request.replayed", f"id-{name}", attempt=1, recomputed_tokens=tokens)


def heard(name: str, times: Sequence[float], recomputed_tokens: int = 0) -> Heard:
    """A greedy stream with one token at each of the times."""
    ids = tuple(range(20, 20 + len(times)))
    scores = tuple(TokenLogprob(token_id, -0.5, ((token_id, -0.5), (1, -2.0))) for token_id in ids)
    arrivals = tuple(
        Arrival(unix_s, StreamEvent(f"id-{name}", 0, place, chr(97 + place % 26), (ids[place],), (scores[place],)))
        for place, unix_s in enumerate(times)
    )
    choice = Choice(
        text="".join(one.event.text for one in arrivals),
        token_ids=ids,
        finish_reason=FinishReason.LENGTH,
        logprobs=scores,
    )
    usage = Usage(PROMPT_TOKENS, len(ids), recomputed_tokens)
    return Heard(name, arrivals, Completion(request_id=f"id-{name}", model="m", choices=(choice,), usage=usage))


def trial(strikes: Sequence[Strike], streams: Sequence[Heard], events: Sequence[ClusterEvent]) -> Trial:
    return Trial(
        strikes=tuple(strikes),
        heard={one.name: one for one in streams},
        verdicts={one.name: Verdict() for one in streams},
        events=tuple(events),
        before=cluster(),
        after=replace(cluster(), coordinator_pid=COORDINATOR),
    )
