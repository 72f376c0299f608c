"""The benchmark of one layer of experts: its floor by hand, and a run on a CPU with small sizes."""

from __future__ import annotations

import argparse

import pytest

from benchmarks.moe_layer import SHAPES, measure


def test_the_floor_counts_what_rows_read_and_multiply() -> None:
    """DeepSeek-V2-Lite: six experts of 3 * 2048 * 1408 numbers, two shared ones, and a router of 64 rows."""
    expert, router = 3 * 2048 * 1408, 64 * 2048
    lite = SHAPES["deepseek-v2-lite"]
    assert lite.floor_bytes(touched=6) == 2 * (8 * expert + router)
    assert lite.flop(rows=10) == 2 * 10 * (8 * expert + router)
    qwen = SHAPES["qwen3-30b-a3b"]
    assert qwen.floor_bytes(touched=128) == 2 * (128 * 3 * 2048 * 768 + 128 * 2048)


@pytest.mark.long
def test_it_runs_on_a_cpu() -> None:
    options = argparse.Namespace(
        device="cpu", dtype="float16", shared="beside", scale=32, layers=2, bandwidth=1e12, rate=1e15
    )
    found = measure("deepseek-v2-lite", 3, options)
    assert found["rows"] == 3 and 6 <= float(str(found["touched"])) <= 18
    parts = ("router_us", "dispatch_us", "experts_us", "combine_us", "shared_us")
    timed = ("layer_us", *parts, "loop_us", "tiled_us", "floor_us")
    assert all(float(str(found[name])) >= 0 for name in timed)
    assert found["floor"] == "bytes" and found["syncs"] is None
