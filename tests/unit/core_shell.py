"""A coordinator's core with everything around it that a test has to say or to see: its shell in these tests.

The text of token 5 is "<5>", so that any text of an answer tells its ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from coordinator.answer_text import AnswerText, Stops
from coordinator.detokenizer import Detokenizer
from coordinator.journal.codec import frame, unframe
from coordinator.journal.state import JournalState, Record
from coordinator.requests.core import CoordinatorCore, CoreConfig
from coordinator.requests.events import (
    Append,
    Deliver,
    Effect,
    Emit,
    Event,
    LinkOpened,
    Reported,
    Send,
)
from coordinator.requests.nouns import Request, Shown
from echelon.errors import EchelonError
from echelon.internal.link import (
    Abandon,
    Assign,
    Command,
    Fence,
    Finish,
    Prompted,
    Released,
    ReplicaHello,
    ReplicaStats,
    Report,
    Running,
    Sampling,
    TokenRun,
)
from echelon.types import Completion, StreamEvent

WINDOW_S = 30.0
STOP_ID = 999
FENCE = Fence(1, 0, 1)
HELLO = ReplicaHello(slots=2, kv_blocks=20, block_tokens=4, max_context=64)


def request(request_id: str = "r", max_tokens: int = 8, **changes: object) -> Request:
    sampling = Sampling(0.0, 1.0, 0, max_tokens, 7, (STOP_ID,))
    made = Request(request_id, b"digest of " + request_id.encode(), "m", (1, 2, 3), sampling, 1000.0, 100.0)
    return replace(made, **changes)  # type: ignore[arg-type]


def new_text(stops: Stops) -> AnswerText:
    return AnswerText(Detokenizer(lambda ids: "".join(f"<{i}>" for i in ids)), stops)


@dataclass
class Shell:
    """Runs the core and sorts its effects; what was appended survives `restart`."""

    state: JournalState = field(default_factory=JournalState)
    term: int = 1
    now: float = 100.0
    max_queue_tokens: int = 1000
    records: list[Record] = field(default_factory=list)
    shown: dict[int, list[Shown]] = field(default_factory=dict)
    commands: list[Command] = field(default_factory=list)
    told: list[Emit] = field(default_factory=list)
    report_seq: int = 0
    hello: ReplicaHello = HELLO
    replicas: int = 1
    canary_idle_s: float | None = None

    def __post_init__(self) -> None:
        limits = WINDOW_S, self.max_queue_tokens
        config = CoreConfig(self.term, *limits, self.replicas, canary_idle_s=self.canary_idle_s)
        self.core = CoordinatorCore(config, new_text, self.state)

    def post(self, event: Event) -> list[Effect]:
        effects = self.core.step(self.now, event)
        for effect in effects:
            match effect:
                case Append(record):
                    self.records.append(record)
                case Deliver(stream, shown):
                    self.shown.setdefault(stream, []).append(shown)
                case Send(command):
                    self.commands.append(command)
                case Emit():
                    self.told.append(effect)
        return effects

    def restart(self) -> Shell:
        """A successor that has nothing but the records."""
        state = JournalState()
        state.apply_all(unframe(frame(self.records, self.term))[0])
        return Shell(
            state,
            self.term + 1,
            self.now,
            records=list(self.records),
            report_seq=self.report_seq,
            hello=self.hello,
        )

    def run(
        self, first: int, *ids: int, attempt: int = 1, finish: Finish | None = None, name: str = "r", choice: int = 0
    ) -> list[Effect]:
        return self.report(runs=(TokenRun(name, choice, attempt, first, ids, finish=finish),))

    def report(
        self,
        runs: tuple[TokenRun, ...] = (),
        released: tuple[Released, ...] = (),
        prompted: tuple[Prompted, ...] = (),
        stats: ReplicaStats | None = None,
        fence: Fence | None = None,
    ) -> list[Effect]:
        self.report_seq += 1
        fence = fence or replace(FENCE, term=self.term)
        return self.post(Reported(Report(fence, self.report_seq, runs, released, stats=stats, prompted=prompted)))

    def open(self, *running: Running, fence: Fence | None = None, last_attempt: int = 2**63) -> None:
        """last_attempt: that the leader was ever given; it had all."""
        hello = replace(self.hello, running=running, last_attempt=last_attempt)
        self.post(LinkOpened(fence or replace(FENCE, term=self.term), hello))

    def assigns(self) -> list[Assign]:
        return [assign for command in self.commands for assign in command.assigns]

    def abandons(self) -> list[Abandon]:
        return [abandon for command in self.commands for abandon in command.abandons]

    def deltas(self, stream: int, choice: int = 0) -> list[StreamEvent]:
        shown = self.shown[stream]
        return [event for event in shown if isinstance(event, StreamEvent) and event.index == choice]

    def ids(self, stream: int, choice: int = 0) -> list[int]:
        return [token_id for event in self.deltas(stream, choice) for token_id in event.token_ids]

    def text(self, stream: int, choice: int = 0) -> str:
        return "".join(event.text for event in self.deltas(stream, choice))

    def final(self, stream: int) -> Completion:
        last = self.shown[stream][-1]
        assert isinstance(last, Completion), last
        return last

    def last_error(self, stream: int) -> Exception:
        last = self.shown[stream][-1]
        assert isinstance(last, EchelonError), last
        return last
