"""Ranks that are killed come back from their shard checkpoints, or from the source with the reason told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from echelon.testing import LocalCluster
from tests.cluster.conftest import Case
from tests.cluster.reference import Reference
from tests.cluster.streams import assert_undisturbed, stream_through
from tests.tiny import make_checkpoint
from worker.checkpoint.manifest import MANIFEST_FILE

pytestmark = [pytest.mark.cluster, pytest.mark.long]


@pytest.fixture
def case(tmp_path: Path, ray_address: str) -> Iterator[Case]:
    model = make_checkpoint(tmp_path / "model", "mixtral", shards=2)
    flags: dict[str, Any] = {"expert": 2, "rebalance_steps": 8, "redundant_experts": 2}
    flags |= {"checkpoint_dir": tmp_path / "store"}
    with LocalCluster(model, tensor=2, dtype="float64", ray_address=ray_address, **flags) as cluster:
        yield Case("kept", cluster, Reference(model))


def told(cluster: LocalCluster, kind: str, epoch: int) -> list[dict[str, Any]]:
    """What was told by the ranks of an epoch, in the order of ranks."""
    events = [event for event in cluster.events() if event.kind == kind and event.detail["epoch"] == epoch]
    return [dict(event.detail) for event in sorted(events, key=lambda event: event.subject)]


def await_shards(cluster: LocalCluster, epoch: int, count: int) -> None:
    cluster.wait(lambda _: len(told(cluster, "shard.written", epoch)) == count, f"{count} shards of epoch {epoch}")


def test_a_killed_rank_comes_back_from_its_shard_with_the_source_gone(case: Case, tmp_path: Path) -> None:
    """Experts have been moved and copied when its rank is killed; then the other shard rots."""
    cluster, first = case.cluster, case.cluster.ranks()[0].epoch
    assert [each["origin"] for each in told(cluster, "weights.loaded", first)] == ["source", "source"]
    await_shards(cluster, first, 2)
    away = tmp_path / "away"
    away.mkdir()
    for path in list((tmp_path / "model").glob("model*")):
        path.rename(away / path.name)
    assert_undisturbed(case, stream_through(cluster.client(), lambda: cluster.kill(1)))
    restored = told(cluster, "weights.loaded", first + 1)
    assert [(each["origin"], each.get("reason")) for each in restored] == [("shard", None)] * 2
    assert [each["bytes"] for each in restored] == [rank.parameter_bytes for rank in cluster.ranks()]

    for path in list(away.iterdir()):
        path.rename(tmp_path / "model" / path.name)
    (weights,) = (tmp_path / "store").glob("*/*/p0-d0-t1/*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert_undisturbed(case, stream_through(cluster.client(), lambda: cluster.kill(0)))
    whole, rotten = told(cluster, "weights.loaded", first + 2)
    assert whole["origin"] == "shard" and rotten["origin"] == "source"
    assert f"{weights}: " in rotten["reason"] and "has crc32c" in rotten["reason"]
    await_shards(cluster, first + 2, 1)
    assert not weights.exists() and len(list((tmp_path / "store").glob(f"*/*/*/{MANIFEST_FILE}"))) == 2
