"""The internal gRPC services on the private port: ranks attach, leaders link.

Runs on the coordinator's loop. Translates, checks the fences of every message, and hands over; the protobuf types of
echelon.internal.v1 end here and in `echelon/internal/wire.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import assert_never

import grpc.aio
import structlog

from coordinator.expert_loads import ExpertLoads
from coordinator.replica.events import (
    Accept,
    Attached,
    Beat,
    Blame,
    Blamed,
    Fault,
    Form,
    Noted,
    OpenStore,
    Progress,
    RankEvent,
    Ready,
    Refuse,
    Resident,
    Retire,
    Retired,
    Settled,
    StoreOpened,
)
from coordinator.replica.service import Outbox, ReplicaService, Told
from coordinator.service import Service
from echelon.convert_cluster import slots_by_rank
from echelon.internal import wire
from echelon.internal.link import PROTOCOL_VERSION, Command
from echelon.internal.v1 import control_pb2, control_pb2_grpc, link_pb2, link_pb2_grpc
from echelon.types import ExpertLoad

log = structlog.get_logger("internal")

AttachContext = grpc.aio.ServicerContext[control_pb2.RankMessage, control_pb2.RankCommand]
ServeContext = grpc.aio.ServicerContext[link_pb2.ReplicaReport, link_pb2.ReplicaCommand]


class RankControlServicer(control_pb2_grpc.RankControlServicer):
    """One Attach stream a rank. epoch_settings: what a FormEpoch says now besides the store and the blocks."""

    def __init__(
        self,
        replicas: Mapping[int, ReplicaService],
        epoch_settings: Callable[[], control_pb2.FormEpoch],
        expert_loads: ExpertLoads,
    ) -> None:
        self._replicas = replicas
        self._expert_loads = expert_loads
        self._epoch_settings = epoch_settings

    async def Attach(
        self, request_iterator: AsyncIterator[control_pb2.RankMessage], context: AttachContext
    ) -> AsyncIterator[control_pb2.RankCommand]:
        first = await anext(request_iterator)
        if first.hello.protocol_version != PROTOCOL_VERSION:
            reason = f"protocol {first.hello.protocol_version}, this coordinator speaks {PROTOCOL_VERSION}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, reason)
        replica = self._replicas.get(first.fence.replica)
        if replica is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"replica {first.fence.replica} is not up yet")
        outbox = replica.attach(attached_of(first))
        reader = asyncio.create_task(self._read(request_iterator, first.hello, replica, outbox))
        try:
            while (told := await outbox.get()) is not None:
                yield self._command(told)
            await ended(reader)
        finally:
            reader.cancel()
            replica.detach(first.hello.rank, first.hello.incarnation, outbox)

    async def _read(
        self,
        messages: AsyncIterator[control_pb2.RankMessage],
        hello: control_pb2.RankHello,
        replica: ReplicaService,
        outbox: Outbox,
    ) -> None:
        """A rank's messages until its stream ends; then the outbox ends too."""
        try:
            async for message in messages:
                if message.HasField("expert_loads"):
                    fence, layers = message.fence, loads_of(message)
                    self._expert_loads.told(fence.replica, hello.rank, fence.epoch, layers)
                    continue
                event = event_of(message, hello.rank, hello.incarnation)
                if event is not None and message.fence.epoch in (0, replica.core.fence.epoch):
                    replica.post(event)
        except grpc.aio.UsageError:
            log.debug("stream closed under its reader", rank=hello.rank)
        finally:
            outbox.put_nowait(None)

    def _command(self, told: Told) -> control_pb2.RankCommand:
        command = control_pb2.RankCommand(fence=wire.fence_to_proto(told.fence))
        match told.command:
            case Accept():
                command.accepted.SetInParent()
            case OpenStore():
                command.open_store.SetInParent()
            case Form(store_address, kv_blocks, settled):
                command.form.CopyFrom(self._epoch_settings())
                command.form.store_address, command.form.kv_blocks = store_address, kv_blocks
                if settled is not None:
                    known = control_pb2.Settled(reserved_blocks=settled.reserved_blocks, graphs=settled.graphs)
                    command.form.settled.CopyFrom(known)
            case Retire():
                command.retire.SetInParent()
            case Blame(first_step, last_step):
                command.blame.first_step, command.blame.last_step = first_step, last_step
            case Refuse(reason):
                command.refused.reason = reason
            case other:
                assert_never(other)
        return command


class ReplicaLinkServicer(link_pb2_grpc.ReplicaLinkServicer):
    """One Serve stream a replica, open to the leader of the epoch that serves and to no other."""

    def __init__(self, replicas: Mapping[int, ReplicaService], service: Service) -> None:
        self._replicas = replicas
        self._service = service

    async def Serve(
        self, request_iterator: AsyncIterator[link_pb2.ReplicaReport], context: ServeContext
    ) -> AsyncIterator[link_pb2.ReplicaCommand]:
        first = wire.report_from_proto(await anext(request_iterator))
        replica = self._replicas.get(first.fence.replica)
        if replica is None or replica.serving != first.fence or first.hello is None:
            serving = None if replica is None else replica.serving
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"{first.fence} may not link: {serving} serves")
        outbox: asyncio.Queue[Command | None] = asyncio.Queue()
        send = outbox.put_nowait
        self._service.open_link(first, send)
        reader = asyncio.create_task(self._read(request_iterator, replica, outbox))
        try:
            while (command := await outbox.get()) is not None:
                yield wire.command_to_proto(command)
            await ended(reader)
        finally:
            reader.cancel()
            self._service.close_link(first.fence, send)

    async def _read(
        self,
        reports: AsyncIterator[link_pb2.ReplicaReport],
        replica: ReplicaService,
        outbox: asyncio.Queue[Command | None],
    ) -> None:
        """A leader's reports while its fence holds."""
        try:
            async for message in reports:
                report = wire.report_from_proto(message)
                if report.fence != replica.serving:
                    log.warning("refused a report", got=report.fence, serving=replica.serving)
                    return
                self._service.reported(report)
        except grpc.aio.UsageError:
            log.debug("link closed under its reader")
        finally:
            outbox.put_nowait(None)


async def ended(reader: asyncio.Task[None]) -> None:
    """Raise what a reader broke on, for gRPC to log; swallowed, its rank would dial again and again unheard."""
    if reader.done():
        await reader


def attached_of(message: control_pb2.RankMessage) -> Attached:
    """A rank's hello as the core's event."""
    hello = message.hello
    return Attached(
        rank=hello.rank,
        incarnation=hello.incarnation,
        pid=hello.pid,
        node_id=hello.node_id,
        phase=hello.phase,
        device=hello.device,
        memory_bytes=hello.memory_bytes,
        epoch=message.fence.epoch,
        resident=resident_of(hello.ready) if hello.HasField("ready") else None,
        layout=hello.layout,
    )


def resident_of(ready: control_pb2.RankReady) -> Resident:
    """What a rank that serves holds."""
    settled = Settled(ready.settled.reserved_blocks, ready.settled.graphs) if ready.HasField("settled") else None
    return Resident(ready.parameter_bytes, ready.kv_bytes, settled)


def event_of(message: control_pb2.RankMessage, rank: int, incarnation: str) -> RankEvent | None:
    """A rank's later message as the core's event; None for a kind this coordinator does not know."""
    match message.WhichOneof("body"):
        case "heartbeat":
            beat = message.heartbeat
            return Beat(rank, incarnation, beat.phase, beat.step, beat.kind, beat.slowest_s)
        case "store_opened":
            return StoreOpened(rank, incarnation, message.store_opened.address)
        case "progress":
            return Progress(rank, incarnation, message.progress.loaded_bytes, message.progress.total_bytes)
        case "ready":
            return Ready(rank, incarnation, resident_of(message.ready))
        case "retired":
            return Retired(rank, incarnation, message.retired.memory_bytes)
        case "loaded":
            return Noted(rank, incarnation, "weights.loaded", noted(message.loaded, message.fence.epoch))
        case "formed":
            parts = {f"{part}_s": round(took_s, 3) for part, took_s in sorted(message.formed.took_s.items())}
            return Noted(rank, incarnation, "rank.formed", {"epoch": message.fence.epoch, **parts})
        case "written":
            kind = "shard.not_written" if message.written.reason else "shard.written"
            return Noted(rank, incarnation, kind, noted(message.written, message.fence.epoch))
        case "graphs":
            kind = "graphs.refused" if message.graphs.reason else "graphs.captured"
            return Noted(rank, incarnation, kind, noted(message.graphs, message.fence.epoch))
        case "fault":
            return fault_of(message.fault, rank, incarnation)
        case "blamed":
            return Blamed(rank, incarnation, tuple(message.blamed.requests))
    return None


def noted(
    told: control_pb2.WeightsLoaded | control_pb2.ShardWritten | control_pb2.GraphsCaptured, epoch: int
) -> dict[str, object]:
    """What is told of weights or graphs, as the event log shows it: what is set."""
    fields: dict[str, object] = {field.name: value for field, value in told.ListFields()}
    return {"epoch": epoch} | fields | {"took_s": round(told.took_s, 3)}


def loads_of(message: control_pb2.RankMessage) -> list[ExpertLoad]:
    """How often a rank has chosen its layers' experts."""
    fence = message.fence
    return [
        ExpertLoad(
            replica=fence.replica,
            epoch=fence.epoch,
            layer=layer.layer,
            rows=tuple(layer.rows),
            slots=slots_by_rank(layer.slots, layer.slots_per_rank),
        )
        for layer in message.expert_loads.layers
    ]


def fault_of(fault: control_pb2.RankFault, rank: int, incarnation: str) -> Fault:
    """A rank's fault as the core's event."""
    return Fault(
        rank,
        incarnation,
        fault.phase,
        fault.error,
        first_step=fault.first_step,
        last_step=fault.last_step,
        of_peer=fault.of_peer,
        requests=tuple(fault.requests),
    )
