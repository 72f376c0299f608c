"""The text of one answer, a piece at a time, and the stop strings that end it.

Lives in the coordinator, pure. What is settled after k ids is a function of those ids alone, however they were cut into
pushes: text that may be the beginning of a stop string is held back until it is known not to be. The one judge of stop
strings; the ids that come after one are no part of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.detokenizer import Detokenizer


@dataclass(frozen=True, slots=True)
class Stops:
    """texts end an answer once it has more than min_tokens ids; keep: the text that ended it stays in."""

    texts: tuple[str, ...] = ()
    keep: bool = False
    min_tokens: int = 0


class AnswerText:
    """Incremental text of one choice. matched: the stop string that ended it, empty while none has."""

    def __init__(self, detokenizer: Detokenizer, stops: Stops) -> None:
        self.matched = ""
        self._detokenizer = detokenizer
        self._stops = stops
        self._longest = max(map(len, stops.texts), default=0)
        self._ids = 0
        self._held_back = ""  # may begin a stop string
        self._told: list[str] = []

    @property
    def text(self) -> str:
        """Everything handed out so far."""
        return "".join(self._told)

    def push(self, ids: Sequence[int]) -> tuple[int, str]:
        """How many of these ids belong to the answer, and the text that they settle; none after a stop."""
        if self.matched:
            return 0, ""
        if not self._stops.texts:
            self._ids += len(ids)
            return len(ids), self._tell(self._detokenizer.push(ids))
        pieces: list[str] = []
        for taken, token_id in enumerate(ids, start=1):
            pieces.append(self._push(token_id))
            if self.matched:
                return taken, "".join(pieces)
        return len(ids), "".join(pieces)

    def flush(self) -> str:
        """What was held back, when no more ids will come; nothing after a stop."""
        rest = "" if self.matched else self._held_back + self._detokenizer.flush()
        self._held_back = ""
        return self._tell(rest)

    def _push(self, token_id: int) -> str:
        self._ids += 1
        open_text = self._held_back + self._detokenizer.push([token_id])
        if self._ids > self._stops.min_tokens and (found := self._find(open_text, len(self._held_back))):
            start, self.matched = found
            self._held_back = ""
            return self._tell(open_text[: start + len(self.matched)] if self._stops.keep else open_text[:start])
        keep = self._may_begin_stop(open_text)
        self._held_back = open_text[len(open_text) - keep :]
        return self._tell(open_text[: len(open_text) - keep])

    def _find(self, text: str, passed: int) -> tuple[int, str] | None:
        """The stop string that begins first, the longest of those that begin together.

        One within the first `passed` characters was complete before it could end the answer, and does not now.
        """
        starts = ((text.find(stop, max(passed - len(stop) + 1, 0)), stop) for stop in self._stops.texts)
        found = [(start, -len(stop), stop) for start, stop in starts if start >= 0]
        return (min(found)[0], min(found)[2]) if found else None

    def _may_begin_stop(self, text: str) -> int:
        """Length of the longest end of the text with which a stop string begins, but not the whole of one."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stops.texts):
                return length
        return 0

    def _tell(self, text: str) -> str:
        if text:
            self._told.append(text)
        return text
