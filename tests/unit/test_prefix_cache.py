"""Equal prefixes are found block by block; another salt, another beginning or another order is another prefix."""

from __future__ import annotations

from collections.abc import Sequence as Ids

from hypothesis import given
from hypothesis import strategies as st

from echelon.internal.block_hash import chain, root_hash
from echelon.internal.link import Progress
from tests.unit.paged_device import request
from worker.prefix_cache import PrefixCache
from worker.sequence import Request, Sequence

BLOCK_TOKENS = 4


def sequence_of(ids: Ids[int], salt: str = "") -> Sequence:
    assign = request("a", ids, 100, salt=salt)
    return Sequence.of(Request(assign, 0, []), Progress(0))


def filled(cache: PrefixCache, ids: Ids[int], salt: str = "") -> Sequence:
    """A sequence whose ids plans have computed."""
    sequence = sequence_of(ids, salt)
    assert cache.begin(sequence, spare=0)
    sequence.planned = len(ids)
    cache.keep(sequence)
    return sequence


def cached(cache: PrefixCache, ids: Ids[int], salt: str = "") -> int:
    """How many leading ids a new sequence need not compute."""
    sequence = sequence_of(ids, salt)
    assert cache.begin(sequence, spare=0)
    found = sequence.cached
    assert found == sequence.planned == sequence.kept * BLOCK_TOKENS
    cache.end(sequence)
    return found


@given(ids=st.lists(st.integers(0, 2**31 - 1), max_size=20), cut=st.integers(0, 5))
def test_a_chain_can_be_continued_where_it_stopped(ids: list[int], cut: int) -> None:
    root = root_hash("salt")
    whole = chain(root, ids, BLOCK_TOKENS)
    assert len(whole) == len(ids) // BLOCK_TOKENS
    head = chain(root, ids[: cut * BLOCK_TOKENS], BLOCK_TOKENS)
    rest = chain(head[-1] if head else root, ids[cut * BLOCK_TOKENS :], BLOCK_TOKENS)
    assert head + rest == whole


def test_a_hash_tells_ids_their_order_what_came_before_and_the_salt() -> None:
    root = root_hash("")
    first, second = chain(root, [1, 2, 3, 4] * 2, BLOCK_TOKENS)
    others = [
        *chain(root, [1, 2, 4, 3], BLOCK_TOKENS),
        *chain(root, [1, 2, 3, 4 + 2**16], BLOCK_TOKENS),
        *chain(root_hash("salt"), [1, 2, 3, 4], BLOCK_TOKENS),
        *chain(root, [1, 2, 3, 4], 2),
    ]
    assert len({first, second, *others}) == 2 + len(others)


def test_what_ended_is_found_in_whole_blocks_and_the_last_id_is_always_computed() -> None:
    cache = PrefixCache(16, BLOCK_TOKENS)
    cache.end(filled(cache, range(10)))
    assert (cache.referenced_blocks, cache.cached_blocks) == (0, 2)
    assert cached(cache, range(10)) == 8
    assert cached(cache, range(9)) == 8
    assert cached(cache, range(8)) == 4, "of eight ids the eighth draws the next: its block is computed"
    assert cached(cache, [*range(5), 99, *range(6, 12)]) == 4
    assert cached(cache, [99, *range(1, 12)]) == 0
    assert cached(cache, range(10), "tenant") == 0


def test_blocks_are_shared_while_they_are_held_and_counted_once() -> None:
    cache = PrefixCache(16, BLOCK_TOKENS)
    first, second = filled(cache, range(9)), filled(cache, range(11))
    assert second.blocks[:2] == first.blocks[:2] and second.blocks[2] != first.blocks[2]
    assert cache.referenced_blocks == 4
    cache.end(first)
    assert cache.referenced_blocks == 3
    cache.check_integrity([second])


def test_drawn_ids_are_found_only_once_they_are_known_and_computed() -> None:
    cache = PrefixCache(16, BLOCK_TOKENS)
    sequence = filled(cache, range(6))
    sequence.planned = 9
    cache.grow(sequence)
    cache.keep(sequence)
    assert cached(cache, range(12)) == 4, "two ids are still in flight"
    sequence.ids += [6, 7, 8]
    cache.keep(sequence)
    assert cached(cache, range(12)) == 8
    sequence.ids += [9, 10, 11]
    cache.keep(sequence)
    assert cached(cache, range(13)) == 8, "the last two are known, but not computed"


def test_the_end_of_a_prefix_is_forgotten_before_its_beginning() -> None:
    cache = PrefixCache(5, BLOCK_TOKENS)
    cache.end(filled(cache, range(16)))
    assert cache.begin(sequence_of(range(100, 106)), spare=0), "a blank block, and one with content"
    assert cache.cached_blocks == 3
    assert cached(cache, range(9)) == 8


def test_a_sequence_begins_only_if_the_spare_blocks_stay_free_those_that_it_revives_counted() -> None:
    cache = PrefixCache(4, BLOCK_TOKENS)
    cache.end(filled(cache, range(9)))
    assert not cache.begin(sequence_of(range(9)), spare=2), "two blocks found are no longer free, one is new"
    assert cache.cached_blocks == 2 and cache.free_blocks == 4
    twins = [sequence_of(range(9)), sequence_of(range(9))]
    assert cache.begin(twins[0], spare=1)
    assert cache.free_blocks == 1
    assert cache.begin(twins[1], spare=0), "two blocks are shared, one is new"
    cache.check_integrity(twins)


def test_identical_blocks_computed_twice_leave_one_entry_and_no_leak() -> None:
    cache = PrefixCache(8, BLOCK_TOKENS)
    twins = [sequence_of(range(9)), sequence_of(range(9))]
    for sequence in twins:
        assert cache.begin(sequence, spare=0) and not sequence.cached
    for sequence in twins:
        sequence.planned = 9
        cache.keep(sequence)
    assert cache.referenced_blocks == 6
    for sequence in twins:
        cache.end(sequence)
    cache.check_integrity([])
    assert (cache.referenced_blocks, cache.cached_blocks) == (0, 2)
