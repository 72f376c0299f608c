"""Bare gRPC stubs to a cluster, past every check of the SDK, and what a refused call is compared by."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from echelon import EchelonError
from echelon.status import from_rpc
from echelon.testing import LocalCluster
from echelon.v1 import generation_pb2_grpc, jobs_pb2_grpc

TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Served:
    """A cluster and bare stubs to it."""

    cluster: LocalCluster
    channel: grpc.Channel
    generation: generation_pb2_grpc.GenerationServiceStub
    jobs: jobs_pb2_grpc.BatchJobServiceStub
    metrics_port: int

    def metrics(self) -> dict[str, float]:
        """Every sample by its name."""
        return read_metrics(self.metrics_port)


def read_metrics(port: int) -> dict[str, float]:
    """Every sample by its name; labels but for `reason` summed up."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=TIMEOUT_S) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples: dict[str, float] = {}
    for sample in (sample for family in families for sample in family.samples):
        for name in (sample.name, f"{sample.name}/{sample.labels.get('reason', '')}"):
            samples[name] = samples.get(name, 0.0) + sample.value
    return samples


def refusal(call: Callable[[], object]) -> EchelonError:
    """The error of a call that must be refused, its gRPC code the same as its packed one."""
    with pytest.raises(grpc.RpcError) as caught:
        answer = call()
        if isinstance(answer, Iterator):  # a stream, whose error comes as it is read
            list(answer)
    error = from_rpc(caught.value, "the cluster")
    assert caught.value.code().value[0] == error.code
    return error
