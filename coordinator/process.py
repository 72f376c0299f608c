"""Everything a coordinator process holds, built in order and taken down in order.

Opens the state directory, builds core, jobs and replicas, serves both gRPC ports, joins Ray, and then keeps the
background tasks running. A task that ends by itself is a defect and ends the coordinator; the supervisor replaces it.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import os
import signal
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import structlog

from coordinator.assembly import Layout, RankLauncher, build_service, read_layout
from coordinator.cluster import Cluster
from coordinator.devices import Slot
from coordinator.expert_loads import ExpertLoads
from coordinator.fences import Fences, SupersededError
from coordinator.internal_server import RankControlServicer, ReplicaLinkServicer
from coordinator.jobs.runner import JobConfig
from coordinator.jobs.service import JobService
from coordinator.ports import Ports
from coordinator.ray_watch import RayWatch
from coordinator.reconfiguration import Reconfiguration
from coordinator.replica.config import ReplicaConfig
from coordinator.replica.core import ReplicaCore
from coordinator.replica.health import HealthLimits
from coordinator.replica.service import Callbacks, ReplicaService
from coordinator.replicas import Edges, Replicas
from coordinator.requests.events import Drain
from coordinator.reserve import Want
from coordinator.server import BatchJobServicer, ClusterServicer, GenerationServicer
from coordinator.serving import Serving
from coordinator.spares import Need, Spares
from coordinator.startup import startup_phases
from echelon import types
from echelon.config import CoordinatorConfig

DRAIN_POLL_S = 0.05

log = structlog.get_logger("coordinator")


class Coordinator:
    """One coordinator. `run` serves until it is cancelled or fails; then `close` ends what it owns."""

    def __init__(self, config: CoordinatorConfig, tell: Callable[..., None]) -> None:
        self._config = config
        self._tell = tell
        self._fences = Fences.open(config.state_dir)
        layout = read_layout(config)
        self._service = build_service(layout, self._fences)
        name, term, events = self._fences.cluster, self._fences.term, self._service.events
        persisted = self._fences.devices, self._fences.persist_devices
        self._cluster = Cluster((name, term), config.ray_address, config.lease_s, self._on_node, *persisted)
        self._ray = RayWatch(config.ray_address, config.served, events.emit, tell)
        self._spares = Spares(self._cluster, name, term, config.device, self._need_of_spares, events)
        self._serving = Serving(
            lambda: self._replicas.services,
            lambda serves: self._spawn(self._ports.set_serving(serves)),
            lambda: self._tell(ready=self._config.address, phases=startup_phases(self._service.events, time.time())),
        )
        self._service.on_proven(self._serving.proven)
        self._replicas = self._build_replicas(layout)
        self._reconfiguration = Reconfiguration(layout, self._service, self._replicas.services, tell)
        self._ports = Ports()
        self._expert_loads = ExpertLoads()
        self._jobs: JobService | None = None
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._hurried = False

    async def run(self) -> None:
        """Bring everything up, then watch over it. Raises EchelonError when it cannot be brought up."""
        self._service.events.emit("coordinator.started", "coordinator", {"term": self._fences.term, "pid": os.getpid()})
        self._service.metrics.term.set(self._fences.term)
        self._jobs = await JobService.open(self._config.state_dir / "jobs.db", self._service, JobConfig())
        self._service.on_interrupted(self._jobs.interrupted)
        if address := self._config.metrics_address:
            self._service.metrics.serve(address)
        await self._ports.set_serving(False)
        await self._set_durable()
        self._service.recorder.on_change = lambda: self._spawn(self._set_durable())
        await self._open_ports(self._jobs)
        await self._watch(self._replicas.run(), self._service.tick(), self._jobs.run(), self._on_ray())

    async def drain(self) -> None:
        """Let what runs finish while `run` goes on, and refuse what is new."""
        self._serving.close()
        await self._ports.set_serving(False)
        self._service.post(Drain())
        deadline_s = time.monotonic() + self._config.drain_timeout_s
        while time.monotonic() < deadline_s and not self._hurried:
            counts = self._service.core.counts
            if counts.queued + counts.running == 0:
                return
            await asyncio.sleep(DRAIN_POLL_S)
        log.warning("the drain has ended early; what still runs is interrupted and can be resumed")

    async def close(self) -> None:
        """End servers, ranks and slots; the state directory stays for a successor. `run` must have ended."""
        try:
            self._fences.check()
        except SupersededError:  # they are a successor's
            raise
        except OSError as error:  # agents do not obey one that was superseded
            log.warning("the term cannot be read; what runs is ended all the same", error=str(error))
        self._service.events.emit("coordinator.stopping", "coordinator")
        self._replicas.close()
        try:
            await self._ports.set_serving(False)
            await self._ports.close()
            if self._jobs is not None:
                await self._jobs.close()
        finally:
            await self._cluster.remove()
            self._service.close()
            self._fences.close()

    def hurry(self) -> None:
        """End the drain now."""
        self._hurried = True

    def reconfigure(self, config: CoordinatorConfig) -> None:
        """Serve this from now on, if that can be; the supervisor is told how it went."""
        self._spawn(self._reconfiguration.change(config, self._jobs))

    def describe(self) -> types.Cluster:
        """Everything that serves, at this moment."""
        layout, counts = self._reconfiguration.layout, self._service.core.counts
        config = layout.config
        model = types.Model(
            name=config.served_model_name,
            source=str(config.model),
            state="active" if self._replicas.serving else "loading",
            dtype=config.dtype,
            architecture=layout.model.architecture,
            max_context=config.max_context,
        )
        return types.Cluster(
            version=importlib.metadata.version("echelon"),
            term=self._fences.term,
            coordinator_pid=os.getpid(),
            queued=counts.queued,
            running=counts.running,
            parked=counts.parked,
            models=(model,),
            replicas=self._replicas.describe(),
            ranks=self._replicas.ranks(),
            journal=self._service.recorder.state,
            spares=self._spares.describe(),
            spare_devices=self._cluster.reserve.describe(),
        )

    def _describe_experts(self) -> list[types.ExpertLoad]:
        replicas = self._replicas.services.items()
        return self._expert_loads.describe({index: replica.core.fence.epoch for index, replica in replicas})

    # Bringing up.

    def _build_replicas(self, layout: Layout) -> Replicas:
        edges = Edges(
            persist_epoch=self._fences.persist_epoch,
            loading=lambda loaded, total: self._tell(loading={"loaded_bytes": loaded, "total_bytes": total}),
            serving=self._on_serving,
            ready=self._serving.started,
            fail=self._fail,
        )
        return Replicas(self._config.replicas, functools.partial(self._build_replica, layout), self._service, edges)

    def _build_replica(self, layout: Layout, replica: int, callbacks: Callbacks) -> ReplicaService:
        config, fences = self._config, self._fences
        core = ReplicaCore(
            ReplicaConfig(
                replica=replica,
                term=fences.term,
                epoch=fences.epoch(replica),
                plan=layout.plan,
                layout=layout.settings.layout,
                incarnation_prefix=f"{fences.cluster}-",
                served=config.served,
                limits=HealthLimits(heartbeat_s=config.heartbeat_s),
            )
        )
        launcher = RankLauncher(self._cluster, self._spares, config, fences)
        return ReplicaService(replica, core, launcher, self._service, callbacks)

    async def _open_ports(self, jobs: JobService) -> None:
        service, replicas = self._service, self._replicas.services
        batch = BatchJobServicer(jobs, lambda: service.facts)
        cluster = ClusterServicer(self.describe, self._describe_experts, service)
        await self._ports.open_public(self._config.address, GenerationServicer(service), batch, cluster)
        ranks = RankControlServicer(replicas, lambda: self._reconfiguration.layout.settings, self._expert_loads)
        await self._ports.open_internal(self._config.internal_address, ranks, ReplicaLinkServicer(replicas, service))

    # Keeping going.

    async def _on_ray(self) -> None:
        """What needs Ray, which takes seconds to join; ranks that serve need not wait for it."""
        await self._ray.join(self._take_over)
        self._replicas.joined([await self._cluster.survivors(replica) for replica in range(self._config.replicas)])
        reserve = self._cluster.reserve.run(self._want_of_devices)
        await self._watch(self._spares.run(), reserve, self._deaths(), self._renew())

    async def _take_over(self) -> None:
        """Join Ray, and sort out what a predecessor left there. Raises InternalError, and can be tried again then."""
        await self._cluster.connect()
        # Ray has put a handler of its own, which dumps stacks and aborts, under Python's.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        if not self._config.served:
            await self._cluster.reserve.check(self._want_of_devices())
        await self._cluster.end_surplus(self._config.replicas)
        await self._cluster.reserve.adopt()
        await self._spares.adopt()

    async def _watch(self, *works: Coroutine[Any, Any, None]) -> None:
        """Until one of them, or a replica, fails."""
        tasks = [asyncio.ensure_future(work) for work in works]
        try:
            done, _ = await asyncio.wait([*tasks, self._failed], return_when=asyncio.FIRST_COMPLETED)
            for ended in done:
                ended.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _deaths(self) -> None:
        async for kind, replica, rank, incarnation in self._cluster.deaths():
            if kind == "spare":
                self._spares.died(replica, rank)
            else:
                self._replicas.died(replica, rank, incarnation)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._config.lease_s / 6)
            self._fences.check()  # no lease from one that was replaced, and that only now wakes
            self._ray.heard(await self._cluster.renew())

    def _on_node(self, kind: str, subject: str, detail: Mapping[str, object]) -> None:
        self._service.events.emit(kind, subject, detail)
        self._spawn(self._spares.on_node(kind, subject.removeprefix("node/")))

    def _need_of_spares(self) -> Need:
        layout, queued, reserve = self._reconfiguration.layout, self._service.core.counts.queued, self._cluster.reserve
        serving_s, spares = self._replicas.all_serving_s, layout.config.spares

        def shard_of(slot: Slot) -> str:
            rank = reserve.devices.rank_of(slot)
            return "" if rank is None else layout.shard_for_device(rank[1])

        return Need(reserve.slots(self._replicas.ranks()), spares, serving_s, queued, shard_of, reserve.slot_of)

    def _want_of_devices(self) -> Want:
        layout, serving = self._reconfiguration.layout, self._replicas.all_serving_s is not None
        return Want(layout.config.spare_devices, layout.plan.degrees.ranks, layout.config.device, serving)

    def _on_serving(self, replicas: int) -> None:
        self._serving.look()
        self._reconfiguration.serving()

    async def _set_durable(self) -> None:
        await self._ports.set_durable(self._service.recorder.durable)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if self._reconfiguration.take_back(error):
            return
        if not self._failed.done():
            self._failed.set_exception(error)
