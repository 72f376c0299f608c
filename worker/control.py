"""The rank's line to the coordinator: one Attach stream, dialled again whenever it breaks.

Runs on the asyncio loop of a rank process. It translates protobuf to calls of `RankHandler` and back, beats with
the rank's phase and step, and keeps the fences: a command of an older term is refused. It knows nothing of
torch, plans or requests.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import grpc.aio
import structlog

from echelon.internal.channel import CLIENT_OPTIONS
from echelon.internal.v1 import control_pb2, control_pb2_grpc
from worker.spec import RankSpec

REDIAL_S = 0.2

log = structlog.get_logger("rank")


class RankHandler(Protocol):
    """What the coordinator can make a rank do; called on the asyncio loop."""

    def hello(self) -> control_pb2.RankHello:
        """Who this rank is, and what it serves now."""

    def beat(self) -> control_pb2.Heartbeat:
        """Its phase and last step."""

    def expert_loads(self) -> control_pb2.ExpertLoads | None:
        """How often experts were chosen, if it is not what was told before."""

    def accepted(self, term: int) -> None:
        """A coordinator of this term has taken the rank in."""

    async def open_store(self) -> str:
        """Open the rendezvous of the next epoch, once; answers host:port. Told again, it answers the same."""

    def form(self, epoch: int, command: control_pb2.FormEpoch) -> None:
        """Start to serve an epoch; reports follow through `ControlLink.send`."""

    def blame(self, first_step: int, last_step: int) -> list[str]:
        """The requests of these steps, on the leader."""

    def retire(self) -> None:
        """End the epoch that is served, and wait for another; told again, it changes nothing."""


class ControlLink:
    """Keeps a rank attached. `send` queues a message; what was queued while detached is sent after the next hello.

    A message can be lost with its stream: what must not be is told again, in the hello or when accepted.
    """

    def __init__(self, spec: RankSpec, handler: RankHandler) -> None:
        self._spec = spec
        self._handler = handler
        self._term = spec.term
        self._epoch = 0
        self._outgoing: asyncio.Queue[control_pb2.RankMessage] = asyncio.Queue()

    @property
    def term(self) -> int:
        """The highest term that has taken this rank in."""
        return self._term

    def send(self, **body: object) -> None:
        """Queue one message; the keyword is the field of RankMessage.body that is set."""
        self._outgoing.put_nowait(control_pb2.RankMessage(fence=self._fence(), **body))  # type: ignore[arg-type]

    def leave(self) -> None:
        """It is of no epoch until it is told the next: another may begin without it, and must hear that it lives."""
        self._epoch = 0

    async def flush(self) -> None:
        """Return when all that was queued has been given to the stream, or was lost with it."""
        await self._outgoing.join()

    async def run(self) -> None:
        """Attach, and attach again, until the coordinator refuses this rank."""
        while True:
            try:
                async with grpc.aio.insecure_channel(self._spec.coordinator_address, options=CLIENT_OPTIONS) as channel:
                    if await self._attach(channel):
                        return
            except grpc.aio.AioRpcError as error:
                log.debug("detached", code=error.code().name, rank=self._spec.rank)
            await asyncio.sleep(REDIAL_S)

    async def _attach(self, channel: grpc.aio.Channel) -> bool:
        """One stream until it ends. True: this rank was refused and must end."""
        call = control_pb2_grpc.RankControlStub(channel).Attach()
        await call.write(control_pb2.RankMessage(fence=self._fence(), hello=self._handler.hello()))
        writers = [asyncio.create_task(self._write(call)), asyncio.create_task(self._beat())]
        try:
            async for command in call:
                if await self._obey(command):
                    return True
            return False
        finally:
            for writer in writers:
                writer.cancel()
            await asyncio.gather(*writers, return_exceptions=True)
            call.cancel()

    async def _obey(self, command: control_pb2.RankCommand) -> bool:
        if command.fence.term < self._term:
            log.warning("refused an older term", got=command.fence.term, term=self._term)
            return False
        self._term = command.fence.term
        match command.WhichOneof("body"):
            case "accepted":
                self._handler.accepted(self._term)
            case "open_store":
                self._epoch = command.fence.epoch
                self.send(store_opened=control_pb2.StoreOpened(address=await self._handler.open_store()))
            case "form":
                self._epoch = command.fence.epoch
                self._handler.form(self._epoch, command.form)
            case "retire":
                self._epoch = command.fence.epoch
                self._handler.retire()
            case "blame":
                requests = self._handler.blame(command.blame.first_step, command.blame.last_step)
                self.send(blamed=control_pb2.RankBlamed(requests=requests))
            case "refused":
                log.info("refused by the coordinator", reason=command.refused.reason)
                return True
        return False

    async def _write(self, call: grpc.aio.StreamStreamCall[control_pb2.RankMessage, control_pb2.RankCommand]) -> None:
        while True:
            message = await self._outgoing.get()
            try:
                await call.write(message)
            finally:
                self._outgoing.task_done()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._spec.heartbeat_s)
            self.send(heartbeat=self._handler.beat())
            if (loads := self._handler.expert_loads()) is not None:
                self.send(expert_loads=loads)

    def _fence(self) -> control_pb2.Fence:
        return control_pb2.Fence(term=self._term, replica=self._spec.replica, epoch=self._epoch)
