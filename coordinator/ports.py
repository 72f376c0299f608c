"""Ports: the two gRPC servers of a coordinator, what can be called at each, and what its health service says.

In the coordinator's process, for `coordinator/process.py`, which knows when there is something to serve. Knows of the
servicers only which service each of them is.
"""

from __future__ import annotations

import asyncio

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from coordinator.decoding import DecodingInterceptor
from coordinator.internal_server import RankControlServicer, ReplicaLinkServicer
from coordinator.server import BatchJobServicer, ClusterServicer, GenerationServicer
from echelon.errors import ConfigError
from echelon.internal.channel import SERVER_OPTIONS
from echelon.internal.v1 import control_pb2_grpc, link_pb2_grpc
from echelon.v1 import cluster_pb2, cluster_pb2_grpc, generation_pb2, generation_pb2_grpc, jobs_pb2, jobs_pb2_grpc

STOP_GRACE_S = 1.0
JOURNAL_HEALTH = "journal"  # a name to ask the health service for: whether what is delivered is durable
LARGE_METHODS = ("/echelon.v1.BatchJobService/CreateBatchJob",)  # a whole batch file in one request


class Ports:
    """Of one coordinator. Opening one raises ConfigError for an address that cannot be bound."""

    def __init__(self) -> None:
        self._health = health.aio.HealthServicer()
        self._servers: list[grpc.aio.Server] = []

    async def open_public(
        self, address: str, generation: GenerationServicer, batch: BatchJobServicer, cluster: ClusterServicer
    ) -> None:
        """What clients call, with health and reflection."""
        server = grpc.aio.server(interceptors=[DecodingInterceptor(LARGE_METHODS)], options=SERVER_OPTIONS)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(generation, server)
        jobs_pb2_grpc.add_BatchJobServiceServicer_to_server(batch, server)
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(cluster, server)
        cluster_pb2_grpc.add_ModelServiceServicer_to_server(cluster, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*service_names(), reflection.SERVICE_NAME, health.SERVICE_NAME), server)
        await self._start(server, address)

    async def open_internal(self, address: str, ranks: RankControlServicer, link: ReplicaLinkServicer) -> None:
        """What ranks dial."""
        server = grpc.aio.server(options=SERVER_OPTIONS)
        control_pb2_grpc.add_RankControlServicer_to_server(ranks, server)
        link_pb2_grpc.add_ReplicaLinkServicer_to_server(link, server)
        await self._start(server, address)

    async def set_serving(self, serving: bool) -> None:
        """What health says of the whole, and of each public service."""
        for name in ("", *service_names()):
            await self._health.set(name, _status(serving))

    async def set_durable(self, durable: bool) -> None:
        """What health says of the journal."""
        await self._health.set(JOURNAL_HEALTH, _status(durable))

    async def close(self) -> None:
        """Calls that run may end within a moment."""
        await asyncio.gather(*(server.stop(STOP_GRACE_S) for server in self._servers))

    async def _start(self, server: grpc.aio.Server, address: str) -> None:
        try:
            server.add_insecure_port(address)
        except RuntimeError:
            raise ConfigError(f"{address} cannot be bound; is the port in use?", field="address") from None
        await server.start()
        self._servers.append(server)


def service_names() -> tuple[str, ...]:
    """The public services, as health and reflection name them."""
    files = (generation_pb2.DESCRIPTOR, jobs_pb2.DESCRIPTOR, cluster_pb2.DESCRIPTOR)
    return tuple(service.full_name for file in files for service in file.services_by_name.values())


def _status(serves: bool) -> health_pb2.HealthCheckResponse.ServingStatus:
    status = health_pb2.HealthCheckResponse
    return status.SERVING if serves else status.NOT_SERVING
