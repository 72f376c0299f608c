"""A rank process on its control line: what a broken stream swallowed is told again on the next one."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc.aio
import pytest
import torch

from echelon.internal.v1 import control_pb2, control_pb2_grpc
from models.files import model_digest
from tests.tiny import make_checkpoint
from worker.checkpoint.write import ShardWriter, Written
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


@contextlib.asynccontextmanager
async def rank_of(
    coordinator: control_pb2_grpc.RankControlServicer, heartbeat_s: float = 0.2
) -> AsyncIterator[RankProcess]:
    """A rank that is still to run, in this process, while its coordinator serves."""
    server = grpc.aio.server()
    control_pb2_grpc.add_RankControlServicer_to_server(coordinator, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    spec = RankSpec(
        coordinator_address=f"127.0.0.1:{port}", cluster="c", replica=0, rank=0, incarnation="1", device="cpu",
        heartbeat_s=heartbeat_s, term=1,
    )  # fmt: skip
    try:
        yield RankProcess(spec)
    finally:
        await server.stop(0)


async def attached(command: control_pb2.RankCommand, streams: int) -> list[tuple[str, str]]:
    """What each stream heard after its hello."""
    coordinator = Coordinator(command, streams)
    async with rank_of(coordinator) as rank:
        await asyncio.wait_for(rank.run(), 30)
    return coordinator.heard


def test_a_fault_is_told_on_every_stream() -> None:
    command = control_pb2.RankCommand(fence=control_pb2.Fence(term=1, replica=0, epoch=1))
    command.form.model_path = "/nowhere"
    heard = asyncio.run(attached(command, 2))
    assert heard == [("waiting", "fault"), ("loading", "fault")]


class Drill(control_pb2_grpc.RankControlServicer):
    """Has one rank serve one model after another, and hears what it says between."""

    def __init__(self, models: list[Path], store: Path | None = None) -> None:
        self._models = models
        self._store = store
        self.loaded: list[control_pb2.WeightsLoaded] = []
        self.written: list[control_pb2.ShardWritten] = []
        self.ready: list[control_pb2.RankReady] = []
        self.threads: list[int] = []
        self.idle_bytes: list[int] = []

    async def Attach(
        self, request_iterator: AsyncIterator[control_pb2.RankMessage], context: object
    ) -> AsyncIterator[control_pb2.RankCommand]:
        async def heard(kind: str) -> control_pb2.RankMessage:
            async for message in request_iterator:
                assert message.WhichOneof("body") != "fault", message.fault.error
                if message.WhichOneof("body") == kind:
                    return message
            raise AssertionError(f"the stream ended before {kind}")

        await anext(request_iterator)
        for number, model in enumerate(self._models, 1):
            fence = control_pb2.Fence(term=1, replica=0, epoch=2 * number)
            yield control_pb2.RankCommand(fence=fence, open_store=control_pb2.OpenStore())
            opened = await heard("store_opened")
            form = control_pb2.FormEpoch(
                store_address=opened.store_opened.address, model_path=str(model), dtype="float32", kv_blocks=8,
                block_tokens=16, max_running=2, max_step_tokens=16, max_context=64,
                pipeline=1, data=1, tensor=1, expert=1, pipeline_depth=1,
            )  # fmt: skip
            if self._store is not None:
                form.checkpoint_dir, form.model_digest = str(self._store), model_digest(model)
            yield control_pb2.RankCommand(fence=fence, form=form)
            self.loaded.append((await heard("loaded")).loaded)
            self.ready.append((await heard("ready")).ready)
            if self._store is not None and self.loaded[-1].origin == "source":
                self.written.append((await heard("written")).written)
            fence.epoch += 1
            for _ in range(2):  # told again it says so again
                yield control_pb2.RankCommand(fence=fence, retire=control_pb2.Retire())
                retired = await heard("retired")
                assert retired.fence.epoch == fence.epoch
            idle = await heard("heartbeat")
            assert idle.fence.epoch == 0, "another epoch may begin without it, and must hear that it lives"
            self.threads.append(threading.active_count())
            self.idle_bytes.append(sum(each.nbytes for each in gc.get_objects() if isinstance(each, torch.Tensor)))
        yield control_pb2.RankCommand(fence=fence, refused=control_pb2.Refused(reason="end"))


def attend(drill: Drill) -> None:
    """One rank process goes through the drill, in this process."""

    async def attach() -> None:
        async with rank_of(drill) as rank:
            await asyncio.wait_for(rank.run(), 60)

    asyncio.run(attach())


def test_a_rank_retires_and_serves_another_model(tmp_path: Path) -> None:
    models = [make_checkpoint(tmp_path / "a"), make_checkpoint(tmp_path / "b", "qwen3", hidden_size=96)] * 2
    drill = Drill(models)
    attend(drill)
    first, second, *again = [ready.parameter_bytes for ready in drill.ready]
    assert first != second and again == [first, second]
    # Two epochs more would have left two at least; asyncio's own pool may grow by one that was not needed before.
    assert drill.threads[-1] <= drill.threads[1] + 1, "each epoch's threads end with it"
    assert drill.idle_bytes[-1] - drill.idle_bytes[1] < first // 4, "nothing of an ended epoch is held"
    assert [(each.origin, each.reason) for each in drill.loaded] == [("source", "")] * 4


def test_a_rank_keeps_a_shard_of_each_model_and_tells_of_it(tmp_path: Path) -> None:
    models = [make_checkpoint(tmp_path / "a"), make_checkpoint(tmp_path / "b", "qwen3", hidden_size=96)] * 2
    drill = Drill(models, tmp_path / "store")
    attend(drill)
    assert [each.origin for each in drill.loaded] == ["source", "source", "shard", "shard"]
    assert all("there is no shard" in each.reason for each in drill.loaded[:2])
    assert [each.bytes for each in drill.loaded[2:]] == [ready.parameter_bytes for ready in drill.ready[2:]]
    assert all(each.bytes > ready.parameter_bytes for each, ready in zip(drill.written, drill.ready, strict=False))


def test_a_shard_is_given_up_with_its_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def start(writer: ShardWriter, tell: Callable[[Written], None]) -> None:
        calls.append("start")
        tell(Written(1, 0.0))

    monkeypatch.setattr(ShardWriter, "start", start)
    monkeypatch.setattr(ShardWriter, "cancel", lambda writer: calls.append("cancel"))
    attend(Drill([make_checkpoint(tmp_path / "a")] * 2, tmp_path / "store"))
    assert calls == ["start", "cancel"] * 2


def test_a_rank_that_cannot_keep_a_shard_serves_and_tells_why(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    drill = Drill([make_checkpoint(tmp_path / "a")], tmp_path / "store")
    attend(drill)
    (written,) = drill.written
    assert written.bytes == 0 and "Not a directory" in written.reason
    assert drill.ready[0].parameter_bytes > 0


class Listener(control_pb2_grpc.RankControlServicer):
    """Hears heartbeats until it is told to end."""

    def __init__(self) -> None:
        self.attached = asyncio.Event()
        self.phases: list[str] = []
        self.end = asyncio.Event()

    async def Attach(
        self, request_iterator: AsyncIterator[control_pb2.RankMessage], context: object
    ) -> AsyncIterator[control_pb2.RankCommand]:
        await anext(request_iterator)
        self.attached.set()
        reading = asyncio.create_task(self._read(request_iterator))
        await self.end.wait()
        yield control_pb2.RankCommand(refused=control_pb2.Refused(reason="end"), fence=control_pb2.Fence(term=1))
        await reading

    async def _read(self, messages: AsyncIterator[control_pb2.RankMessage]) -> None:
        async for message in messages:
            self.phases.append(message.heartbeat.phase)
            self.end.set()


def test_a_rank_tells_that_it_compiles_before_it_does() -> None:
    """Its next heartbeat by itself would come after a minute."""

    async def scenario() -> list[str]:
        listener = Listener()
        async with rank_of(listener, heartbeat_s=60.0) as rank:
            running = asyncio.create_task(rank.run())
            await asyncio.wait_for(listener.attached.wait(), 30)

            def compile_something() -> str:
                with rank._tell_compiling():
                    pass
                return rank.beat().phase

            assert await asyncio.to_thread(compile_something) == "waiting"
            await asyncio.wait_for(running, 30)
        return listener.phases

    assert asyncio.run(scenario()) == ["compiling"]
