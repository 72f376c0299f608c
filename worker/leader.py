"""The leader's shell around EngineCore: plans to every rank, results back, one ReplicaLink to the coordinator.

Runs on the asyncio loop of rank 0 of a replica. It executes the engine's effects in order and decides nothing.
When the link breaks it dials again; meanwhile the engine goes on within its bound. It knows no torch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import grpc.aio
import structlog

from echelon.internal import wire
from echelon.internal.channel import CLIENT_OPTIONS
from echelon.internal.link import Report
from echelon.internal.v1 import link_pb2, link_pb2_grpc
from worker.control import REDIAL_S
from worker.engine import (
    Broken,
    Commanded,
    Completed,
    Drain,
    EngineCore,
    Event,
    LinkClosed,
    LinkOpened,
    RunPlan,
    SendReport,
)
from worker.plan import DRAIN, StepResult, encode

Call = grpc.aio.StreamStreamCall[link_pb2.ReplicaReport, link_pb2.ReplicaCommand]

log = structlog.get_logger("leader")


class Leader:
    """Drives one EngineCore. term tells the current term; broke is called once the epoch cannot go on.

    send_plans gives each data rank the wire form of its plan, or the same to all.
    """

    def __init__(
        self,
        core: EngineCore,
        address: str,
        send_plans: Callable[[Sequence[bytes]], None],
        term: Callable[[], int],
        broke: Callable[[Broken], None],
    ) -> None:
        self._core = core
        self._address = address
        self._send_plans = send_plans
        self._term = term
        self._broke = broke
        self._reports: asyncio.Queue[Report] = asyncio.Queue()

    def completed(self, result: StepResult) -> None:
        """The runner has finished a step; called on the loop."""
        self._post(Completed(result))

    async def run(self) -> None:
        """Serve the replica's link for as long as the process lives."""
        while True:
            try:
                async with grpc.aio.insecure_channel(self._address, options=CLIENT_OPTIONS) as channel:
                    await self._serve(channel)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:  # the latter: written to after its end
                log.debug("link lost", error=str(error))
            await asyncio.sleep(REDIAL_S)

    async def _serve(self, channel: grpc.aio.Channel) -> None:
        await channel.channel_ready()
        self._reports = asyncio.Queue()
        call = link_pb2_grpc.ReplicaLinkStub(channel).Serve()
        self._post(LinkOpened(self._term()))
        tasks = [asyncio.create_task(self._read(call)), asyncio.create_task(self._write(call))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            call.cancel()
            self._post(LinkClosed())
        for task in done:
            task.result()

    async def _read(self, call: Call) -> None:
        async for command in call:
            self._post(Commanded(wire.command_from_proto(command)))

    async def _write(self, call: Call) -> None:
        while True:
            await call.write(wire.report_to_proto(await self._reports.get()))

    def _post(self, event: Event) -> None:
        for effect in self._core.step(time.monotonic(), event):
            match effect:
                case RunPlan(plans):
                    self._send_plans([encode(plan) for plan in plans])
                case Drain():
                    self._send_plans([DRAIN])
                case SendReport(report):
                    self._reports.put_nowait(report)
                case Broken():
                    self._broke(effect)
