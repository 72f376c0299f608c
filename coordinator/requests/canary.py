"""The canary: a token that nobody asked for, drawn to show that a replica computes before health says so.

Part of the coordinator's core; pure. A replica with nothing to do that has drawn no token since its link opened, or for
a while, is assigned a request of one token. It is no user's: never journaled, never counted, and what comes of it is
dropped like the runs of any request that is not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from coordinator.requests.router import Link, Size
from echelon.internal.link import CANARY, Assign, Progress, Sampling

ANSWER_S = 5.0  # for it to come
_SAMPLING = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=1, seed=-1)
_PROMPT = (0,)
_SIZE = Size(len(_PROMPT), (0,), len(_PROMPT) + 1)


def look(now: float, links: Iterable[Link], idle_s: float | None) -> Iterator[tuple[str, Link, str]]:
    """Ask who has been idle for so long; None: nobody. What there is to tell: kind, link, and why."""
    if idle_s is None:
        return
    for link in links:
        if link.token_s is not None and not link.proven:
            link.proven = True
            yield "replica.proven", link, "it has drawn a token in this epoch"
        waited_s = 0.0 if link.asked_s is None else now - link.asked_s
        if waited_s >= ANSWER_S and (link.token_s or 0.0) < (link.asked_s or 0.0):
            link.asked_s = now
            if link.proven:
                link.proven, link.token_s = False, None
                yield "replica.unproven", link, f"it has drawn no token for {waited_s:.1f} s"
        elif not (link.held or link.reserved) and (link.token_s is None or now - link.token_s >= idle_s):
            link.asked_s = now
            attempt = max(int(now * 1000), 1)  # rises, as those of one request must
            link.assign(Assign(CANARY, attempt, _PROMPT, (Progress(0),), _SAMPLING), _SIZE)
