"""What a round of injections did: the phase that each one hit, when it was detected, when each stream went on.

Pure, from what was seen at the strikes, the clients' arrivals and the cluster's events. All times are unix seconds of
one machine. A strike is aimed by looks that are a little old, so what it hit is judged here, from what came after.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from echelon.chaos.compare import Verdict
from echelon.chaos.load import LATE, Arrival, Heard
from echelon.chaos.plan import Injection
from echelon.chaos.victims import Target
from echelon.types import Cluster, ClusterEvent

SERVES = ("replica.ready", "replica.adopted")
REPLAYED = "request.replayed"
_IN_PHASE = re.compile(r"in phase (\w+)")
_PHASES = {"waiting": "form", "store": "form", "loading": "load"}  # of a rank that does not serve yet


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """look: the last before the signal. late_waited: a long prompt was under way."""

    injection: Injection
    target: Target
    unix_s: float
    look: Cluster
    late_waited: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One round under streams. events: of the cluster since before the first strike, in order."""

    strikes: tuple[Strike, ...]
    heard: Mapping[str, Heard]
    verdicts: Mapping[str, Verdict]
    events: tuple[ClusterEvent, ...]
    before: Cluster
    after: Cluster
    survivors: tuple[int, ...] = field(default=())  # pids that were struck and lived when all was over

    @property
    def same(self) -> bool:
        """Whether every stream was the undisturbed one."""
        return all(verdict.same for verdict in self.verdicts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One injection. Times are seconds since it; None where there was nothing of the kind to see.

    first and last: when the first and the last stream had its next token; of a round's last injection alone.
    """

    fault: str
    phase: str
    aimed: str
    detected_s: float | None
    first_s: float | None
    last_s: float | None
    recomputed_tokens: int
    counted: int
    lost: int
    doubled: int


def outcomes(trial: Trial) -> Iterator[Outcome]:
    """Of each injection of a trial. Tokens that were lost or doubled count for all of them."""
    verdicts = trial.verdicts.values()
    for number, strike in enumerate(trial.strikes):
        last = number == len(trial.strikes) - 1
        waits = sorted(next_tokens_s(trial).values()) if last else []
        yield Outcome(
            fault=f"{strike.injection.fault} {strike.target.role}",
            phase=phase_hit(trial, number),
            aimed=strike.injection.when,
            detected_s=detected_s(trial, number),
            first_s=waits[0] if waits else None,
            last_s=waits[-1] if waits else None,
            recomputed_tokens=sum(int(str(event.detail["recomputed_tokens"])) for event in replayed(trial, number)),
            counted=len(next_tokens_s(trial)),
            lost=sum(verdict.lost for verdict in verdicts),
            doubled=sum(verdict.doubled for verdict in verdicts),
        )


def phase_hit(trial: Trial, number: int) -> str:
    """What the cluster was doing at a strike, as a moment of the plan is called."""
    strike = trial.strikes[number]
    if strike.injection.when == "journal":
        return "journal"
    told = lost(trial, number)
    phase = _IN_PHASE.search(str(told[0].detail.get("reason"))) if told else None
    if phase and phase[1] in _PHASES:
        return _PHASES[phase[1]]
    since_unix_s = trial.strikes[number - 1].unix_s if number else strike.unix_s
    serving = [event.unix_s for event in trial.events if event.kind in SERVES and since_unix_s < event.unix_s]
    served = [unix_s for unix_s in serving if unix_s <= strike.unix_s]
    if not served and any(replica.state != "ready" for replica in strike.look.replicas):
        return "load" if any(rank.state == "loading" for rank in strike.look.ranks) else "form"
    if served and _some_wait(trial, served[-1], strike.unix_s):
        return "replay"
    return "prefill" if strike.late_waited else "decode"


def detected_s(trial: Trial, number: int) -> float | None:
    """Until the cluster told of a loss, or another coordinator of its beginning."""
    strike = trial.strikes[number]
    if strike.target.role in ("coordinator", "supervisor"):
        began = _first(trial, "coordinator.started", strike.unix_s)
        return None if began is None else began - strike.unix_s
    told = lost(trial, number)
    return told[0].unix_s - strike.unix_s if told else None


def lost(trial: Trial, number: int) -> list[ClusterEvent]:
    """What the cluster said that it lost between a strike and the next; a spare means nothing but a struck one."""
    spare = trial.strikes[number].target.role == "spare"
    told = [event for event in _since(trial, number) if event.kind.endswith(".lost")]
    return [event for event in told if (event.kind == "spare.lost") == spare]


def replayed(trial: Trial, number: int) -> list[ClusterEvent]:
    """Requests that a strike interrupted, with the tokens that were known of each."""
    return [event for event in _since(trial, number) if event.kind == REPLAYED]


def next_tokens_s(trial: Trial) -> dict[str, float]:
    """By stream, from the last strike to the next token; only streams with tokens before the first strike and after."""
    first, last = trial.strikes[0].unix_s, trial.strikes[-1].unix_s
    found: dict[str, float] = {}
    for name, heard in trial.heard.items():
        resumed = _next_unix_s(trial, heard.arrivals, last)
        if name != LATE and resumed is not None and heard.arrivals[0].unix_s < first:
            found[name] = resumed - last
    return found


def resumed_unix_s(arrivals: Sequence[Arrival], struck_unix_s: float) -> float | None:
    """The end of the longest silence since the strike: what was already on its way came at once. None: nothing came."""
    times = [struck_unix_s, *(one.unix_s for one in arrivals if one.unix_s > struck_unix_s and one.event.token_ids)]
    silences = [(later - earlier, later) for earlier, later in itertools.pairwise(times)]
    return max(silences)[1] if silences else None


def wrong(trial: Trial) -> list[str]:
    """What must not be, a line each: streams that differ, or computed more again than they had to."""
    differing = [
        f"{name}: {what}"
        for name, verdict in trial.verdicts.items()
        for what in (*verdict.differences, *_gaps(verdict))
    ]
    struck = " then ".join(f"{strike.injection} ({strike.target.name})" for strike in trial.strikes)
    return [f"{struck}: {line}" for line in [*differing, *miscounted(trial)]]


def _gaps(verdict: Verdict) -> list[str]:
    counts = {"lost": verdict.lost, "doubled": verdict.doubled}
    return [f"{count} tokens {what}" for what, count in counts.items() if count]


def _next_unix_s(trial: Trial, arrivals: Sequence[Arrival], struck_unix_s: float) -> float | None:
    """No token of a new epoch is older than it; who loses a spare waits for none. Else the longest silence tells."""
    spared = all(strike.target.role == "spare" for strike in trial.strikes)
    formed = struck_unix_s if spared else _first(trial, "replica.ready", struck_unix_s)
    if formed is None:
        return resumed_unix_s(arrivals, struck_unix_s)
    return next((one.unix_s for one in arrivals if one.unix_s > formed and one.event.token_ids), None)


def _first(trial: Trial, kind: str, after_unix_s: float) -> float | None:
    """When an event of the kind came first after a time."""
    return next((event.unix_s for event in trial.events if event.kind == kind and event.unix_s > after_unix_s), None)


def miscounted(trial: Trial) -> list[str]:
    """Streams whose recomputed tokens are not the prompt and what was delivered until then, at each interruption.

    An interruption that a coordinator told of before its end is told again by its successor, and counts once. What it
    had written and not delivered, no client has seen: where one was struck, deliveries are not looked at.
    """
    wrongly = []
    delivers = all(strike.target.role in ("rank", "leader", "spare") for strike in trial.strikes)
    for name, heard in trial.heard.items():
        answer = heard.completion
        if answer is None:
            continue
        told = [event for event in trial.events if event.kind == REPLAYED and event.subject == answer.request_id]
        counts = [int(str(event.detail["recomputed_tokens"])) for event in told]
        times = [*(event.unix_s for event in told), math.inf]
        had = [_delivered(trial, heard.arrivals, *window) for window in itertools.pairwise(times)]
        expected = [answer.usage.prompt_tokens + tokens for tokens in had]
        least = sum(counts if delivers else set(counts))
        if (delivers and counts != expected) or not least <= answer.usage.recomputed_tokens <= sum(counts):
            recomputed = answer.usage.recomputed_tokens
            wrongly.append(f"{name}: recomputed {recomputed}, told {counts}, prompt and delivered {expected}")
    return wrongly


def _delivered(trial: Trial, arrivals: Sequence[Arrival], interrupted_unix_s: float, until_unix_s: float) -> int:
    """Tokens that a client had before the next epoch was formed, or until it was interrupted once more."""
    formed = _first(trial, "replica.ready", interrupted_unix_s)
    end = until_unix_s if formed is None else min(formed, until_unix_s)
    return sum(len(one.event.token_ids) for one in arrivals if one.unix_s < end)


def _some_wait(trial: Trial, served_unix_s: float, unix_s: float) -> bool:
    """Whether a stream that goes on later had not gone on at a time, since the ranks served again."""
    return any(
        not any(served_unix_s < one.unix_s <= unix_s for one in heard.arrivals)
        and any(one.unix_s > unix_s for one in heard.arrivals)
        for name, heard in trial.heard.items()
        if name != LATE
    )


def _since(trial: Trial, number: int) -> list[ClusterEvent]:
    """Events between a strike and the next."""
    begin = trial.strikes[number].unix_s
    following = trial.strikes[number + 1 :]
    end = following[0].unix_s if following else float("inf")
    return [event for event in trial.events if begin <= event.unix_s < end]
