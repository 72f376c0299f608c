"""What happens to a rank that no node has a place for: it is waited for, and that is said once.

Part of the replica's core; pure. Knows neither nodes nor Ray: the reason is told to it.
"""

from __future__ import annotations

from coordinator.replica.attempt import Attempt, RankState
from coordinator.replica.events import Effect, Emit, NoRoom


def wait_for_room(attempt: Attempt, rank: RankState, told: NoRoom, deadline_s: float) -> list[Effect]:
    """Nobody's fault and no failure: the launch waits on, however long, and those beside it wait with it."""
    attempt.deadline_s = deadline_s
    waited, rank.waits_for = bool(rank.waits_for), told.reason
    detail = {"epoch": attempt.fence.epoch, "reason": told.reason}
    return [] if waited else [Emit("rank.no_room", f"rank/{attempt.fence.replica}/{told.rank}", detail)]
