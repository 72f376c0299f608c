"""The block pool: which blocks of the KV cache are referenced, how often, and what those that nobody needs still hold.

Lives in the leader, once for all ranks of a replica: a block id means the same rows of the cache on every rank.
A block whose content has a hash keeps it when its last reference goes, and can be found by it until it is allocated
for something else, the one that was freed first before the others. Knows neither requests nor token ids.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Blocks 0 .. num_blocks - 1 with reference counts; a free block has content to be found, or is blank."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 1, num_blocks
        self._references = [0] * num_blocks
        self._blank = list(reversed(range(num_blocks)))
        self._cached: OrderedDict[int, None] = OrderedDict()  # free, with content; the first is allocated first
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody references, those with content included."""
        return len(self._blank) + len(self._cached)

    @property
    def referenced_blocks(self) -> int:
        """Blocks that somebody references; one that is shared counts once."""
        return len(self._references) - self.free_blocks

    @property
    def cached_blocks(self) -> int:
        """Blocks that nobody references, with content that can still be found."""
        return len(self._cached)

    def allocate(self) -> int:
        """A free block, with one reference; content goes only when no block is blank."""
        assert self.free_blocks, f"all {len(self._references)} blocks are referenced"
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
        self._references[block] = 1
        return block

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks with these contents, until the first that is missing. They are not referenced by that."""
        found: list[int] = []
        for content in hashes:
            if (block := self._block_of.get(content)) is None:
                break
            found.append(block)
        return found

    def unreferenced(self, blocks: Iterable[int]) -> int:
        """How many of these are free now."""
        return sum(not self._references[block] for block in blocks)

    def share(self, block: int) -> None:
        """One more reference to a block that has some, or that has content."""
        if not self._references[block]:
            assert block in self._cached, f"block {block} is blank"
            del self._cached[block]
        self._references[block] += 1

    def keep(self, block: int, content: bytes) -> None:
        """From now on a referenced block is found by its content's hash, unless another block is already."""
        assert self._references[block] > 0, f"block {block} is free"
        assert block not in self._hash_of, f"block {block} has its content's hash already"
        if content not in self._block_of:
            self._block_of[content] = block
            self._hash_of[block] = content

    def forget(self, contents: Iterable[bytes]) -> None:
        """Blocks with these contents are found no more; who references them goes on to."""
        for content in contents:
            if (block := self._block_of.pop(content, None)) is not None:
                del self._hash_of[block]
                if block in self._cached:
                    del self._cached[block]
                    self._blank.append(block)

    def free(self, blocks: Iterable[int]) -> None:
        """One reference less for each; of those whose last it was, the first loses its content first."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} was freed twice"
            self._references[block] -= 1
            if self._references[block]:
                continue
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._blank.append(block)

    def check_integrity(self, tables: Iterable[Iterable[int]] = ()) -> None:
        """The tables hold exactly the references that were counted; every other block is free once; hashes agree."""
        held = Counter(block for table in tables for block in table)
        counted = {block: count for block, count in enumerate(self._references) if count}
        assert counted == held, f"references counted {counted}, held {dict(held)}"
        free = {*self._blank, *self._cached}
        assert len(free) == self.free_blocks, "a block is free twice"
        assert free.isdisjoint(counted), f"free and referenced: {sorted(free & counted.keys())}"
        assert len(free) + len(counted) == len(self._references), "a block is neither free nor referenced"
        assert {block: content for content, block in self._block_of.items()} == self._hash_of, "hashes disagree"
        assert self._cached.keys() <= self._hash_of.keys(), "a block without content waits to be found"
        assert self._hash_of.keys().isdisjoint(self._blank), "a blank block can be found"
