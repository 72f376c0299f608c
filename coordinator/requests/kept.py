"""What requests take that are only remembered, ended and parked ones, and who of them is forgotten first.

Part of the coordinator's core; pure. A request that runs or waits is bounded by the batch and the queue; those that
have ended come at any rate, each for the whole resume window, with log-probabilities by the megabyte.
"""

from __future__ import annotations

from collections import OrderedDict

from coordinator.journal.state import Entry

# As CPython 3.11 to 3.13 keeps them, references included.
REQUEST_BYTES = 3000
ID_BYTES = 40
LOGPROB_BYTES = 200
ALTERNATIVE_BYTES = 72


def memory_bytes(entry: Entry) -> int:
    """About what an entry takes in this process; its journal records are some ten times smaller."""
    logprobs = [logprob for answer in entry.answers for logprob in answer.logprobs if logprob]
    logprobs += entry.prompted.logprobs if entry.prompted else ()
    alternatives = sum(len(logprob.top_ids) for logprob in logprobs)
    ids = len(entry.request.prompt) + entry.generated_tokens
    return REQUEST_BYTES + ID_BYTES * ids + LOGPROB_BYTES * len(logprobs) + ALTERNATIVE_BYTES * alternatives


class Kept:
    """size_bytes: of all of them. forgotten_early: how many were forgotten for want of room."""

    def __init__(self, max_bytes: int) -> None:
        self.size_bytes = 0
        self.forgotten_early = 0
        self.max_bytes = max_bytes
        self._full = False
        self._ended: OrderedDict[str, int] = OrderedDict()  # the oldest first
        self._parked: OrderedDict[str, int] = OrderedDict()

    def moved(self, entry: Entry, rests: bool) -> None:
        """A request has gone into another phase. rests: it neither runs nor waits."""
        self.discard(entry.request.request_id)
        if not rests:
            return
        size_bytes = memory_bytes(entry)
        (self._ended if entry.finished else self._parked)[entry.request.request_id] = size_bytes
        self.size_bytes += size_bytes

    def discard(self, request_id: str) -> None:
        """It is forgotten, or not one of these."""
        self.size_bytes -= self._ended.pop(request_id, 0) + self._parked.pop(request_id, 0)
        self._full = self._full and self.size_bytes > self.max_bytes // 2

    def excess(self) -> str | None:
        """Who is to be forgotten now: of the ended the oldest; a parked one only if there is none. Never the last."""
        if self.size_bytes <= self.max_bytes or len(self._ended) + len(self._parked) < 2:
            return None
        return next(iter(self._ended or self._parked))

    def forget_early(self) -> bool:
        """Count one. Whether it is the first since these took less than half of what they may."""
        self.forgotten_early += 1
        was_full, self._full = self._full, True
        return not was_full
