"""Speculation: ids that may come next, guessed from an answer's own text, and whether guessing pays for it.

Lives in the leader, without torch, clock or I/O. A guess is verified on the device and costs no exactness: it is taken
only where it is the id that is drawn there anyway. Knows ids alone, no plans, blocks or requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import takewhile

Ids = Sequence[int]
Drafter = Callable[[Ids, int], tuple[int, ...]]  # known ids, which only grow, and how many to guess at most -> guesses

_SIZES = (2, 3)  # of the n-grams that are looked up; the longer one is the better evidence
_LOOK_EVERY = 4  # rows, where nothing is found
_LONGEST_PAUSE = 64  # rows: the two that trying costs at most are then a thirtieth
_READ_AT_ONCE = 4096  # ids, of which each takes about 2 us: long prompts must not hold up everybody's next step
_READ_ALWAYS = 2 * _LONGEST_PAUSE  # ids of a choice, whatever others read: what it has drawn since the last time


class Reading:
    """How many ids all drafters of a scheduler may still read before the next result."""

    def __init__(self) -> None:
        self._left = _READ_AT_ONCE

    def renew(self) -> None:
        """A result has come."""
        self._left = _READ_AT_ONCE

    def take(self, wanted: int) -> int:
        """So many of these may be read now."""
        taken = min(wanted, max(self._left, _READ_ALWAYS))
        self._left -= taken
        return taken


class NgramDrafter:
    """Prompt lookup (Saxena 2023): what followed when the last ids stood there before, the latest time.

    Where that reaches the end of what is known it goes on with itself, as text that repeats in a circle does. A long
    prompt is read in pieces, and guessed from when all of it is. A few hundred bytes an id, which is little beside its
    keys and values.
    """

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._behind: dict[tuple[int, ...], int] = {}  # of each n-gram, the position behind it
        self._read = 0  # ids

    def __call__(self, ids: Ids, most: int) -> tuple[int, ...]:
        last = self._read + self._reading.take(len(ids) - self._read)
        for end in range(self._read, last):
            for size in _SIZES[: max(end - 1, 0)]:
                self._behind[tuple(ids[end - size : end])] = end
        self._read = last
        if last < len(ids):
            return ()
        for size in _SIZES[::-1]:
            if (begin := self._behind.get(tuple(ids[-size:]))) is not None:
                circle = len(ids) - begin
                return tuple(ids[begin + place % circle] for place in range(most))
        return ()


class Speculation:
    """Of one choice. A row with drafts, and the row behind it, are planned when all ids before them are known.

    Where others fill steps meanwhile, the choice has no row in these: so it pays if more drafts come true than that.
    Where fewer do, or none, it pauses, for ever more rows until it pays again. Without a drafter it is told guesses.
    """

    def __init__(self, drafter: Drafter | None) -> None:
        self._drafter = drafter or self._predicted
        self._prediction = (0, 0)  # the place, and the id for it
        self._verifying = False
        self._verified = False  # the last row's drafts, and they are not judged yet
        self._came_true = 0
        self._cost = 0  # rows
        self._pause = 0  # rows
        self._next_pause = 1

    def keen(self, ids: Ids) -> bool:
        """Whether there is something to guess behind what is known."""
        return not self._pause and bool(self._drafter(ids, 1))

    def waits(self, ids: Ids, room: bool) -> bool:
        """Whether the next row is not to be planned before the ids in flight are known: what they depend on, or what
        is to be guessed from them, if there is room for it. ids: all that are known."""
        return self._verifying or (room and self.keen(ids))

    def predict(self, place: int, token_id: int) -> None:
        """What may follow what is known: the id for a place, which is the only guess from now on."""
        self._prediction = place, token_id

    def ahead(self) -> None:
        """A row is planned whose id is in flight."""
        self._pause = self._pause - 1 if self._pause else _LOOK_EVERY

    def guess(self, ids: Ids, most: int, without: int, ends: AbstractSet[int] = frozenset()) -> tuple[int, ...]:
        """A row is planned behind ids that are all known: drafts for it, to be verified.

        without: rows that the choice might have had since its last one. ends: with these the answer ends, so nothing is
        to be drawn behind them, and they are no drafts.
        """
        verified, self._verified = self._verified, False
        if verified:
            self._judge(self._cost + without)
        if self._pause:
            self._pause -= 1
            return ()
        found = self._drafter(ids, most) if most > 0 else ()
        drafts = tuple(takewhile(lambda token_id: token_id not in ends, found))
        if drafts:
            self._verifying, self._came_true, self._cost = True, 0, 0 if verified else without
        elif without:
            self._missed()
        else:
            self._pause = _LOOK_EVERY
        return drafts

    def came_true(self) -> None:
        """One of the drafts in flight is what was drawn."""
        self._came_true += 1

    def settle(self) -> None:
        """All of them have come back."""
        self._verifying, self._verified = False, True

    def _judge(self, cost: int) -> None:
        """The last drafts; cost: rows that the choice went without for them."""
        if self._came_true > cost:
            self._next_pause = 1
        elif self._came_true < max(cost, 1):
            self._missed()

    def _predicted(self, ids: Ids, most: int) -> tuple[int, ...]:
        place, token_id = self._prediction
        return (token_id,) if place == len(ids) and most > 0 else ()

    def _missed(self) -> None:
        self._pause = self._next_pause
        self._next_pause = min(2 * self._next_pause, _LONGEST_PAUSE)


def rejected(drafts: Mapping[int, int], ids: Ids) -> AbstractSet[int]:
    """Of a step's sampled rows those whose draft did not come true; what they have drawn follows nothing.

    drafts: of the rows that have one, in order, the id that each goes on from; the row before has drawn what stands
    there. ids: drawn, of all sampled rows.
    """
    wrong: set[int] = set()
    for row, draft in drafts.items():
        if row - 1 in wrong or ids[row - 1] != draft:
            wrong.add(row)
    return wrong
