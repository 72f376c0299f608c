"""The coordinator's heart: one core, its journal, its streams and its links, on one asyncio loop.

`post` gives the core an event and executes the effects in order, so a step is journaled before anyone hears of it.
Streams are queues; gRPC handlers and batch jobs read them alike. It decides nothing and translates nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import structlog

from coordinator.clock import SteadyClock
from coordinator.events import EventLog
from coordinator.frontend import GenerateFields, Prompt, check_received, prompt_ids, resolve
from coordinator.journal.state import Finished, Opened, Record, Tokens
from coordinator.merging import shown
from coordinator.metrics import Metrics
from coordinator.model_facts import ModelFacts, check_vocabulary
from coordinator.recorder import Journal, Recorder
from coordinator.requests.core import CoordinatorCore
from coordinator.requests.events import (
    Append,
    Cancel,
    Deliver,
    Emit,
    Event,
    LinkClosed,
    LinkOpened,
    ModelChanged,
    Reported,
    Send,
    StreamClosed,
    Submit,
    Tick,
)
from coordinator.requests.nouns import Outcome, Received, Shown
from coordinator.settle import Served
from echelon.errors import EchelonError, InvalidRequestError
from echelon.internal.link import Command, Fence, ReplicaStats, Report
from echelon.types import Completion, StreamEvent

TICK_S = 0.25
MAX_CANCELLED = 10_000

log = structlog.get_logger("service")


@dataclass(slots=True)
class Stream:
    """One reader of one request, and what its latency is measured from."""

    queue: asyncio.Queue[Shown]
    opened_s: float
    last_delta_s: dict[int, float] = field(default_factory=dict)  # by choice


@dataclass(frozen=True, slots=True)
class Engine:
    """A replica's engine as its leader last told of it."""

    kv_blocks: int
    stats: ReplicaStats


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What a service is made of."""

    core: CoordinatorCore
    journal: Journal
    events: EventLog
    metrics: Metrics
    served: Served
    clock: Callable[[], float] = field(default_factory=SteadyClock)


class Service:
    """Everything a request passes through between its gRPC handler and the leader of a replica."""

    def __init__(self, parts: Parts) -> None:
        self.core = parts.core
        self.events = parts.events
        self.metrics = parts.metrics
        self.served = parts.served
        self.now = parts.clock
        self.recorder = Recorder(parts.journal, parts.events, parts.metrics)
        self._streams: dict[int, Stream] = {}
        self._stream_ids = itertools.count(1)
        self._links: dict[int, Callable[[Command], None]] = {}
        self._interrupted: Callable[[str], None] = lambda request_id: None
        self._quarantined: Callable[[int], None] = lambda replica: None
        self._proven: Callable[[int, int, bool], None] = lambda replica, epoch, yes: None
        self._engines: dict[int, Engine] = {}

    @property
    def facts(self) -> ModelFacts:
        """Of the served model."""
        return self.served.facts

    def serve(self, served: Served, other_model: bool) -> None:
        """From now on; of another model's requests nothing is remembered."""
        self.served = served
        if other_model:
            self.post(ModelChanged())

    async def submit(self, fields: GenerateFields, received: Received | None = None) -> AsyncGenerator[Shown]:
        """A request's events, ending with its one terminal event; what waits for the reader comes merged. Leaving early
        parks the request.

        Raises EchelonError when the request is refused before the core knows it.
        """
        seed, drawn_id, read_for = secrets.randbits(63), secrets.token_hex(16), None
        while read_for is not self.served:  # another model may have taken over meanwhile
            read_for = self.served
            request = await asyncio.to_thread(resolve, fields, read_for, self.now(), seed, drawn_id)
        if received is not None:
            check_received(received, self.facts)
        if not self.core.is_open(request.request_id):
            self.recorder.check_writable(request.request_id)
        number = next(self._stream_ids)
        stream = Stream(asyncio.Queue(), time.monotonic())
        self._streams[number] = stream
        try:
            self.post(Submit(number, request, received))
            while True:
                for event in await shown(stream.queue):
                    yield event
                    if isinstance(event, Outcome):
                        return
        finally:
            if self._streams.pop(number, None) is not None:
                self.post(StreamClosed(number))

    async def tokenize(self, prompt: Prompt | None) -> tuple[int, ...]:
        """The ids that a generation would be given for this prompt."""
        return await asyncio.to_thread(prompt_ids, prompt, self.served)

    async def detokenize(self, token_ids: tuple[int, ...]) -> str:
        """The text of these ids, special tokens left out."""
        check_vocabulary(token_ids, self.facts, "token_ids")
        return await asyncio.to_thread(self.served.tokenizer.decode_long, token_ids)

    def cancel(self, request_ids: Sequence[str]) -> list[str]:
        """End these requests; answers the ids that were still running. Raises InvalidRequestError for too many."""
        if len(request_ids) > MAX_CANCELLED:
            raise InvalidRequestError(
                f"request_ids has {len(request_ids)} ids; send at most {MAX_CANCELLED} at once", field="request_ids"
            )
        running = [request_id for request_id in dict.fromkeys(request_ids) if self.core.is_open(request_id)]
        self.post(Cancel(tuple(running)))
        return running

    def on_interrupted(self, callback: Callable[[str], None]) -> None:
        """Call back with the id of every request that a fault interrupted and that is taken up again."""
        self._interrupted = callback

    def on_quarantined(self, callback: Callable[[int], None]) -> None:
        """Call back with the replica whose step broke each time a request was found to be why."""
        self._quarantined = callback

    def on_proven(self, callback: Callable[[int, int, bool], None]) -> None:
        """Call back with a replica and its epoch when it has drawn a token in it, and when it draws none any more."""
        self._proven = callback

    def open_link(self, report: Report, send: Callable[[Command], None]) -> None:
        """A leader's hello: its commands go to `send` from now on."""
        assert report.hello is not None
        self._links[report.fence.replica] = send
        self._engines[report.fence.replica] = Engine(report.hello.kv_blocks, report.stats or ReplicaStats())
        self.post(LinkOpened(report.fence, report.hello))

    def close_link(self, fence: Fence, send: Callable[[Command], None]) -> None:
        """The link is gone, unless a newer one has taken its place."""
        if self._links.get(fence.replica) is send:
            del self._links[fence.replica]
            self.post(LinkClosed(fence))

    def reported(self, report: Report) -> None:
        """A leader's report: the core first, then the figures."""
        self.post(Reported(report))
        if report.stats is not None:
            engine = replace(self._engines[report.fence.replica], stats=report.stats)
            self._engines[report.fence.replica] = engine
            usage = engine.stats.blocks_referenced / engine.kv_blocks
            self.metrics.kv_cache_usage.labels(str(report.fence.replica)).set(usage)

    def engine(self, replica: int) -> Engine:
        """What a replica's leader last told; zeros before its first word."""
        return self._engines.get(replica, Engine(0, ReplicaStats()))

    def close(self) -> None:
        """Let go of the journal."""
        self.recorder.close()

    async def tick(self) -> None:
        """Tell the core the time, for as long as the coordinator lives."""
        while True:
            await asyncio.sleep(TICK_S)
            self.post(Tick())
            self._measure_all()

    def _measure_all(self) -> None:
        counts, metrics = self.core.counts, self.metrics
        metrics.queued.set(counts.queued)
        metrics.running.set(counts.running)
        metrics.parked.set(counts.parked)
        metrics.remembered.set(self.core.remembered)
        metrics.open_streams.set(len(self._streams))
        metrics.kept_events.set(len(self.events))
        metrics.tasks.set(len(asyncio.all_tasks()))
        metrics.kept_bytes.set(self.core.kept.size_bytes)
        metrics.forgotten_early.set(self.core.kept.forgotten_early)
        self.recorder.measure()
        for replica, engine in self._engines.items():
            metrics.affinity_hits.labels(str(replica)).set(self.core.affinity_hits(replica))
            metrics.speculated(replica, engine.stats.counters)

    def post(self, event: Event) -> None:
        """One event through the core: its records in one write(), then its other effects in order."""
        effects = self.core.step(self.now(), event)
        records = [effect.record for effect in effects if isinstance(effect, Append)]
        self.recorder.write(records)
        self._count(records)
        for effect in effects:
            match effect:
                case Deliver(stream, stream_event):
                    self._deliver(stream, stream_event)
                case Send(command):
                    if send := self._links.get(command.fence.replica):
                        send(command)
                case Emit(kind, subject, detail):
                    self._emit(kind, subject, detail)

    def _count(self, records: list[Record]) -> None:
        """From records, which are written once: an answer is delivered as often as a client asks for it again."""
        for record in records:
            match record:
                case Opened():
                    self.metrics.requests.inc()
                case Tokens(attempt=attempt, ids=ids) if attempt > 0:
                    self.metrics.generated_tokens.inc(len(ids))
                case Finished(finishes=finishes, error_reason=reason):
                    self.metrics.requests_ended.labels(max(finishes).name.lower() if finishes else reason).inc()

    def _deliver(self, number: int, event: Shown) -> None:
        stream = self._streams.get(number)
        match event:
            case Completion() | EchelonError():
                self._streams.pop(number, None)
            case StreamEvent() if stream is not None:
                self._measure(stream, event)
        if stream is None:
            return
        stream.queue.put_nowait(event)

    def _measure(self, stream: Stream, delta: StreamEvent) -> None:
        now = time.monotonic()
        if (last_s := stream.last_delta_s.get(delta.index)) is not None:
            self.metrics.inter_token.observe((now - last_s) / max(len(delta.token_ids), 1))
        elif not stream.last_delta_s and delta.sequence == 0:
            self.metrics.time_to_first_token.observe(now - stream.opened_s)
        stream.last_delta_s[delta.index] = now

    def _emit(self, kind: str, subject: str, detail: Mapping[str, object]) -> None:
        if kind == "request.replayed":
            self.metrics.replayed_requests.inc()
            self._interrupted(subject)
        if kind in ("replica.proven", "replica.unproven"):
            self._proven(int(subject.removeprefix("replica/")), cast(int, detail["epoch"]), kind == "replica.proven")
        if kind == "request.quarantined":
            self._quarantined(cast(int, detail["replica"]))
        self.events.emit(kind, subject, detail)
