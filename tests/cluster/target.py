"""A cluster under fire: what it was before, and whether it still is.

One CPU rank with the tiny model, in a cluster that the fuzzing tests of a module share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from echelon.internal.channel import CLIENT_OPTIONS
from echelon.testing import LocalCluster
from echelon.v1 import cluster_pb2, generation_pb2
from tests.cluster.calls import METHODS, call, eventually
from tests.cluster.good_messages import JOB_IDS, MAX_RUNNING
from tests.tiny import make_checkpoint

SETTLE_S = 20.0
PROBE = generation_pb2.GenerateRequest(
    text="Geese fly so",
    sampling=generation_pb2.SamplingParams(max_tokens=8, temperature=0.8, seed=11, ignore_eos=True, logprobs=2),
)


@dataclass
class Target:
    """A cluster under fire, and what it was before."""

    cluster: LocalCluster
    channel: grpc.Channel
    before: tuple[object, ...] = ()
    probed: tuple[int, ...] = ()

    def look(self) -> cluster_pb2.Cluster:
        message = self.ask("GetCluster", cluster_pb2.GetClusterRequest().SerializeToString())
        assert isinstance(message, cluster_pb2.Cluster)
        return message

    def ask(self, name: str, payload: bytes) -> object:
        end = call(self.channel, METHODS[name], payload, SETTLE_S)
        assert end.error is None, end.error
        return end.messages[0]

    def probe(self) -> tuple[int, ...]:
        answer = self.ask("Generate", PROBE.SerializeToString())
        assert isinstance(answer, generation_pb2.GenerateResponse)
        return tuple(answer.choices[0].token_ids)

    def assert_undisturbed(self) -> None:
        """Nothing runs, waits or holds a block any more; the same processes answer the same."""
        *_, busy = eventually(lambda: _busy(self.look()), SETTLE_S)
        assert not busy, f"still busy: {busy}"
        assert processes(self.look()) == self.before
        assert self.probe() == self.probed


def _busy(cluster: cluster_pb2.Cluster) -> dict[str, int]:
    blocks = sum(replica.kv_blocks_referenced for replica in cluster.replicas)
    counts = {"queued": cluster.queued, "running": cluster.running, "blocks": blocks}
    return {name: count for name, count in counts.items() if count}


def processes(cluster: cluster_pb2.Cluster) -> tuple[object, ...]:
    pids = (rank.pid for node in cluster.nodes for rank in node.ranks)
    return cluster.coordinator_pid, cluster.term, cluster.replicas[0].epoch, *pids


def fuzz_target(ray_address: str, folder: Path) -> Iterator[Target]:
    """For a fixture of a module: so small that prompts are chunked and requests are preempted.

    The jobs that fuzzing names are there, and other names are not.
    """
    directory = make_checkpoint(folder / "tiny")
    sizes = {"max_running": MAX_RUNNING, "max_queue_tokens": 2000, "max_step_tokens": 32, "kv_cache_tokens": 640}
    with LocalCluster(directory, ray_address=ray_address, resume_window_s=20, **sizes) as cluster:  # type: ignore[arg-type]
        for job_id in filter(None, JOB_IDS):
            cluster.client().jobs.submit([{"custom_id": "a", "prompt": "x", "max_tokens": 3}], job_id=job_id).wait()
        with grpc.insecure_channel(cluster.target, options=CLIENT_OPTIONS) as channel:
            target = Target(cluster, channel)
            target.before, target.probed = processes(target.look()), target.probe()
            yield target
