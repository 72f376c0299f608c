"""A rank process on its control line: what a broken stream swallowed is told again on the next one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc.aio

from echelon.internal.v1 import control_pb2, control_pb2_grpc
from worker.rank import RankProcess
from worker.spec import RankSpec


class Coordinator(control_pb2_grpc.RankControlServicer):
    """Tells a rank to form an epoch that it cannot form. Each stream ends at the rank's second word, unread."""

    def __init__(self, command: control_pb2.RankCommand, streams: int) -> None:
        self._command = command
        self._streams = streams
        self.heard: list[tuple[str, str]] = []

    async def Attach(
        self, request_iterator: AsyncIterator[control_pb2.RankMessage], context: object
    ) -> AsyncIterator[control_pb2.RankCommand]:
        hello = await anext(request_iterator)
        if len(self.heard) == self._streams:
            self._command = control_pb2.RankCommand(
                fence=self._command.fence, refused=control_pb2.Refused(reason="end")
            )
        yield self._command
        if self._command.HasField("refused"):
            return
        answer = await anext(request_iterator)
        while answer.HasField("heartbeat"):
            answer = await anext(request_iterator)
        self.heard.append((hello.hello.phase, answer.WhichOneof("body") or ""))
        self._command = control_pb2.RankCommand(fence=self._command.fence)
        self._command.accepted.SetInParent()


async def attached(command: control_pb2.RankCommand, streams: int) -> list[tuple[str, str]]:
    """What each stream heard after its hello."""
    server = grpc.aio.server()
    coordinator = Coordinator(command, streams)
    control_pb2_grpc.add_RankControlServicer_to_server(coordinator, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    spec = RankSpec(
        coordinator_address=f"127.0.0.1:{port}", cluster="c", replica=0, rank=0, incarnation="1", device="cpu",
        heartbeat_s=0.2, term=1,
    )  # fmt: skip
    await asyncio.wait_for(RankProcess(spec).run(), 30)
    await server.stop(0)
    return coordinator.heard


def test_a_fault_is_told_on_every_stream() -> None:
    command = control_pb2.RankCommand(fence=control_pb2.Fence(term=1, replica=0, epoch=1))
    command.form.model_path = "/nowhere"
    heard = asyncio.run(attached(command, 2))
    assert heard == [("waiting", "fault"), ("loading", "fault")]
