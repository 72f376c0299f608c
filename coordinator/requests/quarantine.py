"""Which requests break the steps that compute them: suspicion, and the replay of one suspect at a time that settles it.

Part of the coordinator's core; pure. Only errors raised inside a step count: signals, stops and lost nodes are nobody's
fault here. It is not journaled: a coordinator that dies forgets suspicions, and two more broken steps bring them back,
while no request that has ended by its quarantine is taken up again.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from coordinator.requests.life import Life, Phase
from coordinator.requests.router import Link
from coordinator.requests.waiting import Waiting

ERRORS_TO_SUSPECT = 2
# What a suspect has to draw by itself, each choice, before it may be with others again: it broke at most as many steps
# after its last journaled token as are planned ahead and reported late.
CLEARED_TOKENS = 8


class Decision(enum.Enum):
    """What is done with a request whose step broke."""

    REPLAY = "replay"
    REPLAY_ALONE = "replay alone"
    QUARANTINE = "quarantine"


def decide(errors: int, alone: bool) -> tuple[Decision, str]:
    """errors: steps with the request that broke, the last one included; alone: nobody else was in that one."""
    if errors < ERRORS_TO_SUSPECT:
        return Decision.REPLAY, f"{errors} step with it broke, which may be chance"
    if alone:
        return Decision.QUARANTINE, f"{errors} steps with it broke, and in the last one it was alone"
    return Decision.REPLAY_ALONE, f"{errors} steps with it broke, in the last one it was with others"


def room(links: Sequence[Link], replicas: int) -> Link | None:
    """The replica that a suspect is to have to itself: one that is kept for it, or is empty, or holds least.

    While one of them all is on its way back from a fault it is waited for, so that nobody is disturbed elsewhere.
    """
    least = min(links, key=lambda link: (not link.reserved, len(link.held)), default=None)
    if least is None or (least.held and not least.reserved and len(links) < replicas):
        return None
    return least


class Quarantine:
    """Requests that were in broken steps, by id. waiting: the suspects that wait, each for a replica of its own."""

    def __init__(self) -> None:
        self.waiting = Waiting()
        self._errors: dict[str, int] = {}
        self._suspects: set[str] = set()
        self._replayed: Life | None = None
        self._replayed_to = 0  # tokens with which the one that is replayed is cleared

    @property
    def idle(self) -> bool:
        """Nobody is suspected."""
        return not self._suspects

    @property
    def replayed(self) -> Life | None:
        """The suspect that is replayed now."""
        return self._replayed

    def suspects(self, request_id: str) -> bool:
        return request_id in self._suspects

    def broke(self, request_id: str, alone: bool) -> tuple[Decision, str]:
        """A step that this request was in broke."""
        self._errors[request_id] = errors = self._errors.get(request_id, 0) + 1
        decision, reason = decide(errors, alone)
        if decision is Decision.REPLAY_ALONE:
            self._suspects.add(request_id)
        return decision, reason

    def replay(self, life: Life) -> None:
        """A suspect has a replica to itself from now on."""
        self._replayed = life
        self._replayed_to = life.entry.generated_tokens + CLEARED_TOKENS * len(life.progress())

    def passes(self, life: Life) -> bool:
        """Whether its new tokens clear a suspect, which they do once."""
        passed = life is self._replayed and life.entry.generated_tokens >= self._replayed_to
        if passed:
            self.forget(life.request_id)
        return passed

    def moved(self, life: Life, phase: Phase) -> None:
        """It does something else now. A suspect that runs no more stays one, unless it has ended."""
        self.waiting.discard(life)
        if life is self._replayed and phase is not Phase.RUNNING:
            self._replayed = None
        if phase is Phase.ENDED:
            self.forget(life.request_id)

    def forget(self, request_id: str) -> None:
        """It has ended, or is cleared."""
        self._errors.pop(request_id, None)
        self._suspects.discard(request_id)
        if self._replayed is not None and self._replayed.request_id == request_id:
            self._replayed = None
