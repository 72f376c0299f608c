"""Placement: KV blocks follow the batch or the memory, and a shortage is told with its arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.placement import RankMemory, ReplicaPlan
from echelon.errors import ConfigError
from parallel.degrees import Degrees

MIB = 2**20
PLAN = ReplicaPlan(
    degrees=Degrees(tensor=2),
    parameter_bytes=(10 * MIB, 10 * MIB),
    block_bytes=(MIB, MIB),
    block_tokens=16,
    max_context=33,
    memory_fraction=0.5,
    shared_memory=False,
)
TWICE = Degrees(replicas=2, tensor=2)


def test_the_cache_takes_all_that_a_device_of_its_own_allows() -> None:
    assert PLAN.kv_blocks([RankMemory("a", 1000 * MIB)] * 2) == 500 - 10


def test_a_limit_is_kept_in_shared_memory_and_gives_no_memory_that_is_not_there() -> None:
    plan = replace(PLAN, shared_memory=True)
    apart = [RankMemory("a", 1000 * MIB), RankMemory("b", 1000 * MIB)]
    assert replace(plan, kv_blocks_limit=3).kv_blocks(apart) == 3
    assert replace(plan, kv_blocks_limit=1000).kv_blocks(apart) == 490
    assert replace(PLAN, kv_blocks_limit=3).kv_blocks(apart) == 490, "ranks first take off what a step needs"


def test_the_rank_with_the_least_memory_decides() -> None:
    assert PLAN.kv_blocks([RankMemory("a", 1000 * MIB), RankMemory("a", 30 * MIB)]) == 5


def test_ranks_of_one_node_share_its_memory_on_cpu() -> None:
    memory = [RankMemory("a", 60 * MIB), RankMemory("a", 60 * MIB)]
    assert replace(PLAN, shared_memory=True).kv_blocks(memory) == 5
    apart = [RankMemory("a", 60 * MIB), RankMemory("b", 60 * MIB)]
    assert replace(PLAN, shared_memory=True).kv_blocks(apart) == 20


def test_no_room_for_one_request_is_refused_with_the_arithmetic_and_a_remedy() -> None:
    plan = replace(PLAN, shared_memory=True)
    with pytest.raises(ConfigError) as caught:
        plan.kv_blocks([RankMemory("a", 48 * MIB)] * 2)
    message = str(caught.value)
    for part in (
        "48.0 MiB free",
        "0.5 / 2 ranks",
        "10.0 MiB of weights",
        "room for 2 blocks",
        "needs 3 blocks",
        "to 32 or",
    ):
        assert part in message


def test_weights_that_do_not_fit_are_told_as_such() -> None:
    with pytest.raises(ConfigError, match="the weights alone leave no room"):
        PLAN.kv_blocks([RankMemory("a", MIB)] * 2)


def test_replicas_of_one_node_share_its_memory_on_cpu() -> None:
    memory = [RankMemory("a", 120 * MIB), RankMemory("a", 120 * MIB)]
    assert replace(PLAN, shared_memory=True, degrees=TWICE).kv_blocks(memory) == 5
    assert replace(PLAN, degrees=TWICE).kv_blocks(memory) == 50, "devices are not shared"
