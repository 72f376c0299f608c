"""One cluster, another layout, limit or model: the same processes, no token lost, or nothing changes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from echelon import ConfigError
from echelon.testing import LocalCluster
from tests.cluster.conftest import Case
from tests.cluster.layouts import LAYOUTS
from tests.cluster.reference import Reference
from tests.cluster.streams import PROMPT, alive, assert_undisturbed, stream_through

pytestmark = pytest.mark.cluster

FAMILIES = ("llama-2", "qwen3-2")


@pytest.fixture(scope="module")
def models(checkpoints: dict[str, Path]) -> dict[str, Path]:
    return {name: checkpoints[LAYOUTS[name].checkpoint] for name in FAMILIES}


@pytest.fixture(scope="module")
def cluster(models: dict[str, Path], ray_address: str) -> Iterator[LocalCluster]:
    with LocalCluster(models["llama-2"], tensor=2, dtype="float64", ray_address=ray_address) as made:
        yield made


@pytest.fixture(scope="module")
def references(models: dict[str, Path]) -> dict[str, Reference]:
    return {name: Reference(directory) for name, directory in models.items()}


def assert_answers(cluster: LocalCluster, reference: Reference) -> None:
    answer = cluster.client().generate(PROMPT, max_tokens=16, temperature=0.0, ignore_eos=True)
    assert answer.token_ids == reference.greedy(PROMPT, 16).ids


def test_models_and_layouts_are_walked_by_the_same_processes(
    cluster: LocalCluster, models: dict[str, Path], references: dict[str, Reference]
) -> None:
    first = cluster.status()
    pids = {rank.tensor: rank.pid for rank in first.ranks}
    epoch = first.replicas[0].epoch
    for name, tensor in product(("qwen3-2", "llama-2"), (1, 2)):
        begun_s = time.monotonic()
        now = cluster.reconfigure(model=models[name], tensor=tensor)
        sys.stdout.write(f"{name} over {tensor}: {time.monotonic() - begun_s:.2f} s\n")
        epoch += 1
        assert now.replicas[0].epoch == epoch
        assert {rank.tensor: rank.pid for rank in now.ranks} == {rank: pids[rank] for rank in range(tensor)}
        assert (now.coordinator_pid, now.term) == (first.coordinator_pid, first.term)
        assert now.models[0].source == str(models[name])
        assert all(rank.parameter_bytes == rank.planned_parameter_bytes > 0 for rank in now.ranks)
        assert_answers(cluster, references[name])
    assert all(alive(pid) for pid in pids.values())


def test_streams_go_on_over_another_layout_and_other_limits(
    cluster: LocalCluster, references: dict[str, Reference]
) -> None:
    case = Case("reconfigured", cluster, references["llama-2"])
    changes: list[dict[str, object]] = [
        {"tensor": 1},
        {"tensor": 2, "max_step_tokens": 7},
        {"tensor": 1, "pipeline": 2, "max_step_tokens": None},
        {"tensor": 2, "pipeline": None},
    ]
    for change in changes:
        before = cluster.status().replicas[0].epoch

        def reconfigure(change: dict[str, object] = change) -> None:
            cluster.reconfigure(**change)

        assert_undisturbed(case, stream_through(cluster.client(), reconfigure))
        assert cluster.status().replicas[0].epoch == before + 1


def test_what_cannot_be_served_is_refused_and_disturbs_nothing(
    cluster: LocalCluster, models: dict[str, Path], references: dict[str, Reference]
) -> None:
    before = cluster.status()
    case = Case("refused", cluster, references["llama-2"])

    def refuse_all() -> None:
        """What depends on the stream first, while it is sure to be there."""
        with pytest.raises(ConfigError, match="1 requests and 0 jobs are open"):
            cluster.reconfigure(model=models["qwen3-2"])
        with pytest.raises(ConfigError, match="max-context cannot be lowered"):
            cluster.reconfigure(max_context=384)
        with pytest.raises(ConfigError, match=r"tensor=7.*tensor may be"):
            cluster.reconfigure(tensor=7)
        with pytest.raises(ConfigError, match="model"):
            cluster.reconfigure(model="/nowhere")
        with pytest.raises(ConfigError, match=r"lease-s is 30.* cannot become 60"):
            cluster.reconfigure(lease_s=60)

    assert_undisturbed(case, stream_through(cluster.client(), refuse_all))
    after = cluster.status()
    assert after.replicas[0].epoch == before.replicas[0].epoch
    assert [rank.pid for rank in after.ranks] == [rank.pid for rank in before.ranks]


@pytest.mark.long
def test_a_layout_that_does_not_come_up_is_taken_back(cluster: LocalCluster, references: dict[str, Reference]) -> None:
    """What memory there is, ranks say only once they have begun."""
    with pytest.raises(ConfigError, match="no memory for the KV cache"):
        cluster.reconfigure(gpu_memory_fraction=1e-9)
    cluster.wait(lambda now: now.replicas[0].state == "ready", "the earlier layout")
    assert len(cluster.ranks()) == 2
    assert_answers(cluster, references["llama-2"])


@pytest.mark.long
def test_a_changed_layout_outlives_coordinator_and_ranks(
    cluster: LocalCluster, references: dict[str, Reference]
) -> None:
    """A successor adopts processes that have served several layouts, and knows the last one."""
    case = Case("outlived", cluster, references["llama-2"])
    before = cluster.reconfigure(tensor=1)
    assert_undisturbed(case, stream_through(cluster.client(), lambda: cluster.kill("coordinator")))
    after = cluster.status()
    assert after.term == before.term + 1
    assert [rank.pid for rank in after.ranks] == [rank.pid for rank in before.ranks], "the rank was adopted"
    assert_undisturbed(case, stream_through(cluster.client(), lambda: cluster.kill(0)))
    assert len(cluster.ranks()) == 1
    cluster.reconfigure(tensor=2)
    assert_answers(cluster, references["llama-2"])
