"""The prefix cache: blocks of sequences, found again by the ids that they and all blocks before them hold.

Lives in the leader. Equal hashes (`echelon/internal/block_hash.py`) mean equal prefixes. Only full blocks of known ids
are kept: given ones as soon as a plan fills them, for ranks run plans in order, and drawn ones once they are committed.
Who runs it does not know.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from echelon.internal.block_hash import chain, root_hash
from worker.block_pool import BlockPool
from worker.sequence import Sequence


class PrefixCache:
    """Gives blocks to sequences, shared ones for what is known already, and takes them back."""

    def __init__(self, kv_blocks: int, block_tokens: int) -> None:
        self._pool = BlockPool(kv_blocks)
        self._block_tokens = block_tokens

    @property
    def free_blocks(self) -> int:
        """Blocks that can be allocated."""
        return self._pool.free_blocks

    @property
    def referenced_blocks(self) -> int:
        """Blocks that sequences hold."""
        return self._pool.referenced_blocks

    @property
    def cached_blocks(self) -> int:
        """Blocks that nobody holds, with content that can still be found."""
        return self._pool.cached_blocks

    def known(self, hashes: Iterable[bytes]) -> int:
        """Tokens of the blocks that can be found."""
        return len(self._pool.find(hashes)) * self._block_tokens

    def begin(self, sequence: Sequence, spare: int) -> bool:
        """Blocks for all that is given, its known beginning shared. False: fewer than `spare` would be left free."""
        reusable = sequence.reusable // self._block_tokens
        self._hash(sequence, reusable)
        shared = self._pool.find(islice(sequence.hashes, reusable))
        fresh = -(-sequence.given // self._block_tokens) - len(shared)
        if fresh + self._pool.unreferenced(shared) + spare > self._pool.free_blocks:
            return False
        for block in shared:
            self._pool.share(block)
        sequence.blocks = shared + [self._pool.allocate() for _ in range(fresh)]
        sequence.kept = len(shared)
        sequence.planned = sequence.cached = len(shared) * self._block_tokens
        return True

    def grow(self, sequence: Sequence) -> int:
        """One more block for a sequence; there must be a free one."""
        block = self._pool.allocate()
        sequence.blocks.append(block)
        return block

    def shrink(self, sequence: Sequence) -> None:
        """Take blocks back that nothing is planned in any more: drafts' that did not come true."""
        used = -(-sequence.planned // self._block_tokens)
        self._pool.free(reversed(sequence.blocks[used:]))
        del sequence.blocks[used:]

    def keep(self, sequence: Sequence) -> None:
        """Full blocks of ids that are known, and that plans fill, can be found by what is planned from now on."""
        full = min(len(sequence.ids), sequence.planned) // self._block_tokens
        self._hash(sequence, full)
        for index in range(sequence.kept, full):
            self._pool.keep(sequence.blocks[index], sequence.hashes[index])
        sequence.kept = full

    def end(self, sequence: Sequence) -> None:
        """Take all blocks back. A prefix is of use without its end, so its end is forgotten first."""
        self._pool.free(reversed(sequence.blocks))
        sequence.blocks = []
        sequence.computed = max(sequence.computed, sequence.planned)
        sequence.planned = sequence.kept = 0

    def forget(self, sequences: Iterable[Sequence]) -> None:
        """Nothing that these hold or held is found any more."""
        for sequence in sequences:
            self._pool.forget(sequence.hashes)

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Every block is free, or held as often as these sequences say."""
        self._pool.check_integrity(sequence.blocks for sequence in sequences)

    def _hash(self, sequence: Sequence, blocks: int) -> None:
        """Know the hashes of its first `blocks` blocks."""
        known = len(sequence.hashes)
        if known < blocks:
            parent = sequence.hashes[-1] if known else root_hash(sequence.assign.cache_salt)
            ids = sequence.ids[known * self._block_tokens : blocks * self._block_tokens]
            sequence.hashes += chain(parent, ids, self._block_tokens)
