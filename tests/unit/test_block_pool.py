"""Blocks are conserved: each is free once or counted as often as it is held, whatever the order of calls."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.block_pool import BlockPool


@settings(deadline=None, derandomize=True, database=None)
@given(num_blocks=st.integers(1, 12), choices=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 99)), max_size=60))
def test_any_order_of_allocating_sharing_and_freeing_conserves_blocks(
    num_blocks: int, choices: list[tuple[int, int]]
) -> None:
    pool = BlockPool(num_blocks)
    held: list[int] = []
    for operation, pick in choices:
        if operation == 0 and pool.free_blocks:
            block = pool.allocate()
            assert block not in held
            held.append(block)
        elif operation == 1 and held:
            pool.share(held[pick % len(held)])
            held.append(held[pick % len(held)])
        elif operation == 2 and held:
            pool.free([held.pop(pick % len(held))])
        pool.check_integrity([held[:2], held[2:]])
        assert pool.referenced_blocks == len(set(held))
        assert pool.free_blocks + pool.referenced_blocks == num_blocks
    pool.free(held)
    pool.check_integrity()
    assert sorted(pool.allocate() for _ in range(num_blocks)) == list(range(num_blocks))


def test_a_shared_block_stays_until_its_last_reference_goes() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.share(block)
    pool.free([block])
    assert pool.referenced_blocks == 1
    pool.free([block])
    assert pool.referenced_blocks == 0


def test_misuse_is_caught() -> None:
    pool = BlockPool(1)
    block = pool.allocate()
    with pytest.raises(AssertionError, match="all 1 blocks are referenced"):
        pool.allocate()
    pool.free([block])
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free([block])
    with pytest.raises(AssertionError, match="is free"):
        pool.share(block)


def test_integrity_names_a_leak_and_a_loss() -> None:
    pool = BlockPool(3)
    block = pool.allocate()
    with pytest.raises(AssertionError, match="references counted"):
        pool.check_integrity()
    with pytest.raises(AssertionError, match="references counted"):
        pool.check_integrity([[block], [block]])
