"""What a plan's numbers mean: where the time of a round goes, what limits a layout, and why one beats another.

Pure, for the planner: forecasts in, sentences out. Every sentence says a number and what follows from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from coordinator.plan.forecast import Forecast
from coordinator.plan.memory import Limits
from coordinator.plan.roofline import Slot
from coordinator.plan.search import Plan, Ranking, as_flags, gigabytes

AXES = ("replicas", "pipeline", "data", "tensor")
LARGE = 0.3  # of a round: worth a sentence
RIVALS = 4  # layouts that the best is compared with, of different kinds

WORDS = {
    "weights": "reading weights",
    "experts": "reading experts",
    "attention": "reading the KV cache",
    "head": "the vocabulary's head",
    "exchange": "exchange between ranks",
    "idle": "waiting for other stages",
}
REMEDIES = {
    "weights": "more requests at once cost little more time",
    "experts": "more requests at once cost little more time, until every expert is busy",
    "attention": "it grows with requests and their length; more data or tensor ranks share it",
    "head": "more requests at once cost little more time",
    "exchange": "fewer tensor ranks, or ranks of one node, exchange less",
    "idle": "requests for every stage fill the pipeline, and fewer stages leave less to wait for",
}


@dataclass(frozen=True, slots=True)
class Shares:
    """Of a decode round, from 0 to 1: each kind of work on the mean stage, and what stages wait for each other."""

    weights: float
    experts: float
    attention: float
    head: float
    exchange: float
    idle: float

    def largest(self) -> tuple[str, float]:
        """By name, with its share."""
        name = max((field.name for field in fields(self)), key=lambda name: float(getattr(self, name)))
        return name, float(getattr(self, name))


def decode_shares(found: Forecast) -> Shares:
    """Where a round of decoding goes."""
    each = found.cohorts / (len(found.slots) * found.round_s)

    def share(name: str) -> float:
        return each * sum(float(getattr(slot, name)) for slot in found.slots)

    weights, experts, attention, head, exchange = (share(field.name) for field in fields(Slot))
    idle = max(0.0, 1 - weights - experts - attention - head - exchange)
    return Shares(weights, experts, attention, head, exchange, idle)


def what_limits(plan: Plan, limits: Limits) -> list[str]:
    """The largest part of a decode round, and what the KV cache holds back."""
    found, tightest = plan.forecast, plan.load.tightest
    name, share = decode_shares(found).largest()
    lines = [f"decoding: {WORDS[name]} is {share:.0%} of a round; {REMEDIES[name]}"]
    if found.running < found.case.requests:
        lines.append(
            f"memory: the KV cache holds {found.running:,} of {found.case.requests:,} requests of "
            f"{found.case.tokens:,} tokens at once, the others wait; stage {tightest.stage} holds the fewest tokens"
        )
    else:
        most = plan.load.requests(found.case.tokens)
        lines.append(
            f"memory: the KV cache holds {most:,} requests of {found.case.tokens:,} tokens at once, or "
            f"{plan.load.requests(limits.max_context):,} of max-context {limits.max_context:,}"
        )
    if (share := tightest.weight_bytes / tightest.usable_bytes) > 1 - LARGE:
        lines.append(
            f"memory: weights take {share:.0%} of what a GPU of stage {tightest.stage} may use, "
            f"{gigabytes(tightest.room_bytes)} are left for KV cache"
        )
    return lines


def why(ranking: Ranking, latency: bool) -> list[str]:
    """What the best layout beats, by how much, and where the difference lies."""
    best = ranking.plans[0]
    others = f"{len(ranking.plans)} of {ranking.divided} layouts of {best.degrees.ranks} GPUs fit in memory"
    lines = [f"{others}; {as_flags(best.degrees)} is the {'fastest' if latency else 'most productive'} one"]
    return lines + [_beaten(best, rival) for rival in rivals(ranking.plans)]


def meshes(plans: Iterable[Plan]) -> list[Plan]:
    """The best plan of each mesh: how its ranks share experts is often all the same."""
    found: dict[tuple[int, ...], Plan] = {}
    for plan in plans:
        found.setdefault(tuple(getattr(plan.degrees, axis) for axis in AXES), plan)
    return list(found.values())


def rivals(plans: Iterable[Plan]) -> list[Plan]:
    """The best layout of each other kind: a kind is the set of axes that are longer than 1."""
    kinds: dict[tuple[bool, ...], Plan] = {}
    for plan in plans:
        kinds.setdefault(tuple(getattr(plan.degrees, axis) > 1 for axis in AXES), plan)
    return list(kinds.values())[1 : RIVALS + 1]


def _beaten(best: Plan, rival: Plan) -> str:
    """In seconds of the whole case, which both do in full."""
    ours, theirs = best.forecast, rival.forecast
    more = theirs.total_s / ours.total_s - 1
    if more < 0.001:
        return f"{as_flags(rival.degrees)} is as fast, and less plain"
    mine, other = _seconds(ours), _seconds(theirs)
    name = max(other, key=lambda name: other[name] - mine[name])
    return (
        f"{as_flags(rival.degrees)} takes {more:.1%} longer, most of it in {name}: "
        f"{_time(other[name])} instead of {_time(mine[name])}"
    )


def _seconds(found: Forecast) -> dict[str, float]:
    """Of the whole case, by what takes them."""
    waves = -(-found.case.requests // found.running)
    decode_s = waves * found.case.output_tokens * found.round_s
    shares = decode_shares(found)
    return {WORDS[field.name]: decode_s * getattr(shares, field.name) for field in fields(Shares)} | {
        "prefill": found.total_s - decode_s
    }


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"
