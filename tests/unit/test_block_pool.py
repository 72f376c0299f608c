"""Blocks are conserved: each is free once or counted as often as it is held, and found by its content or not at all."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.block_pool import BlockPool


@settings(deadline=None, derandomize=True, database=None, max_examples=200)
@given(num_blocks=st.integers(1, 8), choices=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 99)), max_size=80))
def test_any_order_of_calls_conserves_blocks_and_finds_what_is_kept(
    num_blocks: int, choices: list[tuple[int, int]]
) -> None:
    """Against a model: lists of blank and cached blocks in the order in which they are to be allocated."""
    pool = BlockPool(num_blocks)
    held: list[int] = []
    content: dict[int, bytes] = {}  # of blocks, by the model
    cached: list[int] = []
    for operation, pick in choices:
        chosen = held[pick % len(held)] if held else None
        if operation == 0 and pool.free_blocks:
            evicted = cached.pop(0) if pool.free_blocks == len(cached) else None
            block = pool.allocate()
            assert block not in held and evicted in (None, block)
            content.pop(block, None)
            held.append(block)
        elif operation == 1 and chosen is not None:
            pool.share(chosen)
            held.append(chosen)
        elif operation == 2 and chosen is not None:
            held.remove(chosen)
            pool.free([chosen])
            if chosen not in held and chosen in content:
                cached.append(chosen)
        elif operation == 3 and chosen is not None and chosen not in content:
            name = bytes([pick % 7])
            pool.keep(chosen, name)
            if name not in content.values():
                content[chosen] = name
        elif operation == 4 and (found := pool.find([bytes([pick % 7])])):
            pool.share(found[0])
            held.append(found[0])
            if found[0] in cached:
                cached.remove(found[0])
        pool.check_integrity([held[:2], held[2:]])
        assert pool.referenced_blocks == len(set(held))
        assert pool.cached_blocks == len(cached)
        assert pool.free_blocks + pool.referenced_blocks == num_blocks
        assert {name: block for block, name in content.items()} == {
            name: pool.find([name])[0] for name in map(bytes, zip(range(7))) if pool.find([name])
        }
    pool.free(held)
    pool.check_integrity()
    assert sorted(pool.allocate() for _ in range(num_blocks)) == list(range(num_blocks))
    assert pool.cached_blocks == 0


def test_a_shared_block_stays_until_its_last_reference_goes() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.share(block)
    pool.free([block])
    assert pool.referenced_blocks == 1
    pool.free([block])
    assert pool.referenced_blocks == 0


def test_content_outlives_its_references_until_the_block_is_needed_the_oldest_first() -> None:
    pool = BlockPool(3)
    old, new, blank = pool.allocate(), pool.allocate(), pool.allocate()
    pool.keep(old, b"old")
    pool.keep(new, b"new")
    pool.free([old, new, blank])
    assert (pool.cached_blocks, pool.free_blocks) == (2, 3)
    assert pool.find([b"old", b"new"]) == [old, new] and pool.find([b"missing", b"new"]) == []
    assert pool.allocate() == blank, "a block without content is taken first"
    assert pool.allocate() == old and pool.find([b"old"]) == []
    assert pool.find([b"new"]) == [new]
    pool.share(new)
    assert pool.cached_blocks == 0 and pool.free_blocks == 0


def test_of_two_blocks_with_one_content_the_first_is_found_and_the_second_is_blank_once_free() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(), pool.allocate()
    pool.keep(first, b"same")
    pool.keep(second, b"same")
    pool.free([second, first])
    pool.check_integrity()
    assert pool.find([b"same"]) == [first] and pool.cached_blocks == 1
    assert pool.allocate() == second


def test_misuse_is_caught() -> None:
    pool = BlockPool(1)
    block = pool.allocate()
    pool.keep(block, b"content")
    with pytest.raises(AssertionError, match="hash already"):
        pool.keep(block, b"other")
    with pytest.raises(AssertionError, match="all 1 blocks are referenced"):
        pool.allocate()
    pool.free([block])
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free([block])
    with pytest.raises(AssertionError, match="is free"):
        pool.keep(block, b"content")
    assert pool.allocate() == block
    pool.free([block])
    with pytest.raises(AssertionError, match="is blank"):
        pool.share(block)


def test_integrity_names_a_leak_and_a_loss() -> None:
    pool = BlockPool(3)
    block = pool.allocate()
    with pytest.raises(AssertionError, match="references counted"):
        pool.check_integrity()
    with pytest.raises(AssertionError, match="references counted"):
        pool.check_integrity([[block], [block]])
