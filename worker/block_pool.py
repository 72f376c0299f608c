"""The block pool: which blocks of the KV cache are referenced, and how often.

Lives in the leader, once for all ranks of a replica: a block id means the same rows of the cache on every rank.
Blocks come back when their last reference goes. Knows neither requests nor reservations; an empty pool is a
defect of whoever allocates, because the scheduler admits nothing that it has not reserved blocks for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class BlockPool:
    """Blocks 0 .. num_blocks - 1 with reference counts; the block freed last is allocated first."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 1, num_blocks
        self._references = [0] * num_blocks
        self._free = list(reversed(range(num_blocks)))

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody references."""
        return len(self._free)

    @property
    def referenced_blocks(self) -> int:
        """Blocks that somebody references; one that is shared counts once."""
        return len(self._references) - len(self._free)

    def allocate(self) -> int:
        """A free block, with one reference."""
        assert self._free, f"all {len(self._references)} blocks are referenced: more was allocated than reserved"
        block = self._free.pop()
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more reference to a block that has some."""
        assert self._references[block] > 0, f"block {block} is free"
        self._references[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """One reference less for each; a block without references can be allocated again."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} was freed twice"
            self._references[block] -= 1
            if not self._references[block]:
                self._free.append(block)

    def check_integrity(self, tables: Iterable[Iterable[int]] = ()) -> None:
        """The tables together hold exactly the references that were counted, and every other block is free once."""
        held = Counter(block for table in tables for block in table)
        counted = {block: count for block, count in enumerate(self._references) if count}
        assert counted == held, f"references counted {counted}, held {dict(held)}"
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert free.isdisjoint(counted), f"free and referenced: {sorted(free & counted.keys())}"
        assert len(free) + len(counted) == len(self._references), "a block is neither free nor referenced"
