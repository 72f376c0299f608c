"""What a rank's own word of a fault means: at once the reason, or to be held until a better one has had time to come.

Part of the replica's core; pure. Ranks wait for each other, so one that dies or breaks makes others tell of it; and
whose request broke a step only the leader knows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from coordinator.replica.events import Fault

FAULT_S = 1.0  # for a death to be heard of that explains a fault while forming: who waits for a dead rank fails at once
PEER_S = 0.5  # the same while serving, where each moment is one of silence to somebody
BLAME_S = 0.5  # for the leader to say whose step it was


@dataclass(frozen=True, slots=True)
class Told:
    """A fault that a rank told. until_s: what may explain it has time until then.

    step_broke: an error of this rank's own inside a step. asks: (first, last) step of which the leader is to say whose
    they are. requests: whose they were, as far as is known.
    """

    rank: int
    reason: str
    until_s: float
    of_peer: bool = False
    step_broke: bool = False
    asks: tuple[int, int] | None = None
    requests: tuple[str, ...] = ()


def judge(now: float, fault: Fault, forming: bool, held: Told | None) -> Told:
    """The fault to hold. The first counts, since others follow from it, but one of its own before one of a peer."""
    if held is not None and (fault.of_peer or not held.of_peer):
        return held
    told = Told(fault.rank, f"{fault.phase}: {fault.error}", now, fault.of_peer)
    if forming:
        return replace(told, until_s=now + FAULT_S)
    if fault.of_peer:
        return replace(told, until_s=now + PEER_S)
    if not fault.first_step:
        return told
    if fault.requests or fault.rank == 0:
        return replace(told, step_broke=True, requests=fault.requests)
    asks = fault.first_step, fault.last_step
    return replace(told, until_s=now + BLAME_S, step_broke=True, asks=asks)
