"""Which prompts a replica has computed lately: what of the next one it need not compute again.

Part of the coordinator's core; pure. One for each cache of blocks: today a replica's, with data ranks one for each of
them. It follows the cache from afar, by the prompts that were assigned, as llm-d's approximate prefix cache does: as
many blocks as the cache holds at most, the least recently used forgotten first. To be wrong costs time, no token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence

MAX_BLOCKS = 2**16  # of one cache: a million tokens, in some 10 MB


class Prefixes:
    """Blocks by their chained hash. A block is never known without those before it: its last use is theirs, too."""

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self.hits = 0  # requests that came here for a prefix
        self._max_blocks = max_blocks
        self._used: OrderedDict[bytes, None] = OrderedDict()  # the least recently used first

    def __len__(self) -> int:
        return len(self._used)

    def match(self, prefix: Sequence[bytes]) -> int:
        """How many of these blocks, from the first on, are known."""
        return bisect_left(prefix, True, key=lambda block: block not in self._used)

    def use(self, prefix: Sequence[bytes]) -> None:
        """A prompt of these blocks is computed there. A prefix is of use without its end: that is forgotten first."""
        for block in reversed(prefix):
            self._used[block] = None
            self._used.move_to_end(block)
        while len(self._used) > self._max_blocks:
            self._used.popitem(last=False)
