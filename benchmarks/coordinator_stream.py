"""Coordinator with its gRPC writes: CPU time of its process per token, from a leader's report to the client's socket.

    python benchmarks/coordinator_stream.py [--streams 64] [--steps 400] [--step-s 0.02]

The coordinator's own service and servicer answer real streams of a client in another process; reports arrive as a
leader's would, one token for each stream a step. Prints one JSON line in microseconds per token, and how many of
them the journal takes; aim: 100.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import grpc.aio

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.tiny

from coordinator.answer_text import AnswerText
from coordinator.detokenizer import Detokenizer
from coordinator.events import EventLog
from coordinator.fences import Fences
from coordinator.grammars import Grammars
from coordinator.journal.file import JournalFile
from coordinator.journal.state import Record
from coordinator.metrics import Metrics
from coordinator.model_facts import ModelFacts
from coordinator.requests.core import CoordinatorCore, CoreConfig
from coordinator.server import GenerationServicer
from coordinator.service import Parts, Service
from coordinator.settle import Served
from coordinator.tokenizer import Tokenizer
from echelon import AsyncClient
from echelon.internal import wire
from echelon.internal.channel import SERVER_OPTIONS
from echelon.internal.link import Assign, Command, Fence, Finish, ReplicaHello, Report, TokenRun
from echelon.internal.v1 import link_pb2
from echelon.v1 import generation_pb2_grpc
from tests.tiny import make_checkpoint

FENCE = Fence(1, 0, 1)


async def read_streams(address: str, streams: int, steps: int) -> None:
    """In the client's process: every stream to its end."""

    async def read(client: AsyncClient, number: int) -> int:
        stream = client.stream("Geese fly so.", request_id=f"request-{number}", max_tokens=steps, ignore_eos=True)
        return sum([len(event.token_ids) async for event in stream])

    async with AsyncClient(address) as client:
        counts = await asyncio.gather(*(read(client, number) for number in range(streams)))
    assert counts == [steps] * streams, counts


class TimedJournal(JournalFile):
    """spent_s: CPU time of its appends."""

    spent_s = 0.0

    def append(self, records: Sequence[Record]) -> None:
        began_s = time.thread_time()
        super().append(records)
        self.spent_s += time.thread_time() - began_s


async def measure(streams: int, steps: int, step_s: float, folder: Path) -> tuple[float, float]:
    """Seconds of CPU per token, and those of the journal."""
    model = make_checkpoint(folder / "model")
    tokenizer = Tokenizer.from_directory(model)
    fences = Fences.open(folder / "fences")
    journal = TimedJournal(folder / "journal", term=fences.term, check_term=fences.check)
    config = CoreConfig(1, 60.0, 2**31)
    core = CoordinatorCore(config, lambda stops: AnswerText(Detokenizer(tokenizer.decode), stops), journal.state)
    facts = ModelFacts(name="model", vocab_size=tokenizer.vocab_size, max_context=2**20)
    served = Served(facts, tokenizer, Grammars(model, facts))
    service = Service(Parts(core=core, journal=journal, events=EventLog(1), metrics=Metrics.create(), served=served))
    assigns: list[Assign] = []

    def take(command: Command) -> None:
        assigns.extend(command.assigns)

    service.open_link(Report(FENCE, 0, hello=ReplicaHello(streams, 2**30, 16, 2**20)), take)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationServicer(service), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    command = [sys.executable, __file__, "--client", address, "--streams", str(streams), "--steps", str(steps)]
    client = await asyncio.create_subprocess_exec(*command)
    while len(assigns) < streams:
        await asyncio.sleep(0.01)
    draw = random.Random(0)
    begin_s, journal.spent_s = time.process_time(), 0.0
    for step in range(steps):
        finish = Finish.LENGTH if step == steps - 1 else None
        ids = [draw.randrange(tokenizer.vocab_size) for _ in assigns]
        runs = tuple(
            TokenRun(assign.request, 0, assign.attempt, step, (token_id,), finish=finish)
            for assign, token_id in zip(assigns, ids, strict=True)
        )
        message = wire.report_to_proto(Report(FENCE, step + 1, runs)).SerializeToString()
        service.reported(wire.report_from_proto(link_pb2.ReplicaReport.FromString(message)))
        await asyncio.sleep(step_s)
    code = await client.wait()
    spent_s = time.process_time() - begin_s
    await server.stop(None)
    service.close()
    fences.close()
    assert code == 0, "the client did not get every token"
    return spent_s / (streams * steps), journal.spent_s / (streams * steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--step-s", type=float, default=0.02)
    parser.add_argument("--client", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client:
        asyncio.run(read_streams(arguments.client, arguments.streams, arguments.steps))
        return
    with tempfile.TemporaryDirectory() as folder:
        seconds, journal_s = asyncio.run(measure(arguments.streams, arguments.steps, arguments.step_s, Path(folder)))
    line = {"benchmark": "coordinator_stream", "streams": arguments.streams, "steps": arguments.steps}
    told = {"us_per_token": round(seconds * 1e6, 2), "journal_us_per_token": round(journal_s * 1e6, 2), "aim_us": 100}
    print(json.dumps({**line, **told}))


if __name__ == "__main__":
    main()
