"""All remembered requests: their streams, their queue, their ends; the core's memory.

Part of the coordinator's core, sans-IO. It admits, attaches, parks, ends and forgets requests, and collects the
effects of a step. Every record it makes is folded into the journal's state at once, so what it knows is what a
successor will know. It asks the router to withdraw an attempt, and leaves assignment to the core.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

from coordinator.journal.state import Finished, Forgotten, JournalState, Opened, Record, Tokens
from coordinator.requests.admission import Queue, refuse_attach, refuse_open
from coordinator.requests.config import CoreConfig
from coordinator.requests.events import Append, Deliver, Effect, Emit, Submit
from coordinator.requests.kept import Kept
from coordinator.requests.life import Due, Life, NewText, Phase
from coordinator.requests.nouns import Outcome, Received, Request, Shown
from coordinator.requests.quarantine import Quarantine
from coordinator.requests.router import Router
from coordinator.requests.timers import Timers
from coordinator.requests.waiting import Waiting
from echelon.errors import CancelledError, DeadlineError, EchelonError, StreamTakenOverError
from echelon.internal.link import TokenRun

REATTACH_S = 10.0  # a new coordinator lets replicas go on so long with requests whose clients have not come back yet
TERM_SHIFT = 32


class Lives:
    """Requests by id. A step's effects pile up until taken: appends, then deliveries; what there is to tell at last."""

    def __init__(self, config: CoreConfig, new_text: NewText, state: JournalState, router: Router) -> None:
        self.draining = False
        self.quarantine = Quarantine()
        self.phases: Counter[Phase] = Counter()
        self.kept = Kept(config.max_kept_bytes)
        self._config = config
        self._new_text = new_text
        self._state = state
        self._router = router
        self._lives: dict[str, Life] = {}
        self._streams: dict[int, Life] = {}
        self._arrivals = itertools.count()
        self._waiting = Waiting()
        self._timers = Timers()
        self._appends: list[Effect] = []
        self._deliveries: list[Effect] = []
        self._told: list[Effect] = []

    def __len__(self) -> int:
        return len(self._lives)

    def __iter__(self) -> Iterator[Life]:
        return iter(tuple(self._lives.values()))

    def get(self, request_id: str) -> Life | None:
        return self._lives.get(request_id)

    def running_on(self, replica: int) -> list[Life]:
        """Those whose current attempt is this replica's, oldest first."""
        return [life for life in self if life.phase is Phase.RUNNING and life.entry.replica == replica]

    def first_queued(self) -> Life | None:
        return self._waiting.first

    def take_effects(self, sends: list[Effect]) -> list[Effect]:
        """Everything since the last call, in the order of execution."""
        effects = [*self._appends, *self._deliveries, *sends, *self._told]
        self._appends, self._deliveries, self._told = [], [], []
        return effects

    def record(self, record: Record) -> None:
        """To be written before anything of this step is told; true for us from now on."""
        self._state.apply(record)
        self._appends.append(Append(record))

    def next_attempt(self) -> int:
        """A number that no attempt at any request has had, even if the journal has lost some: terms are never lost."""
        return max(self._state.last_attempt, (self._config.term - 1) << TERM_SHIFT) + 1

    def emit(self, kind: str, subject: str, **detail: object) -> None:
        self._told.append(Emit(kind, subject, detail))

    def restore(self, now: float) -> None:
        """Take up where the journal ends. What a replica held may still be held: its next hello will say."""
        for entry in self._state.entries.values():
            phase = Phase.ENDED if entry.finished else Phase.RUNNING if entry.assigned else Phase.PARKED
            life = Life(entry, phase, self._new_text, next(self._arrivals), detached_unix_s=now)
            self._lives[life.request_id] = life
            self.phases[phase] += 1
            if life.ended and not entry.finished:  # the last tokens were written, their end was not
                self._finish(now, life)
            self.kept.moved(life.entry, life.phase in (Phase.ENDED, Phase.PARKED))
            self._look_at(life, now)

    # Streams

    def close_stream(self, now: float, stream: int) -> None:
        """Its client is gone; a stream that has had its terminal event is not known here."""
        if life := self._streams.pop(stream, None):
            life.detach(now)
            self._park(now, life)

    def submit(self, now: float, submit: Submit) -> None:
        assert submit.stream not in self._streams, f"stream {submit.stream} has submitted already"
        request, received = submit.request, submit.received or ()
        life = self._lives.get(request.request_id)
        if life:
            refusal = refuse_attach(life.entry, request, received, self._new_text)
        else:
            queue = Queue(self._waiting.prompt_tokens, self._config.max_queue_tokens, self.draining)
            refusal = refuse_open(request, received, queue, self._new_text)
        if refusal:
            self._deliveries.append(Deliver(submit.stream, refusal))
            return
        if life is None:
            life = self._open(now, request, received)
        else:
            self._take_over(life, received)
        self._attach(now, life, submit.stream, received)

    def _take_over(self, life: Life, received: Received) -> None:
        """A power cut took the journal's end, but the client has it: go on from there, not from what a leader holds."""
        longer = [
            Tokens(life.request_id, 0, len(answer.ids), ids[len(answer.ids) :], choice=choice)
            for choice, (ids, answer) in enumerate(zip(received, life.entry.answers, strict=False))
            if len(ids) > len(answer.ids)
        ]
        if longer:
            for record in longer:
                self.record(record)
            life.judge_all()
            self._withdraw(life)
            self.move(life, Phase.PARKED)

    def _open(self, now: float, request: Request, received: Received) -> Life:
        self.record(Opened(request, received))
        entry = self._state.entries[request.request_id]
        life = Life(entry, Phase.PARKED, self._new_text, next(self._arrivals), detached_unix_s=now)
        self._lives[life.request_id] = life
        self.phases[life.phase] += 1
        self._look_at(life, request.deadline_unix_s)
        return life

    def _attach(self, now: float, life: Life, stream: int, received: Received) -> None:
        """Show the stream what it lacks, and see that the request goes on."""
        if life.stream is not None:
            taken_over = StreamTakenOverError("another stream attached to this request", request_id=life.request_id)
            self._end_stream(life, taken_over)
        self._streams[stream] = life
        for shown in life.attach(stream, received):
            self._deliver(life, shown)
        if life.phase is Phase.ENDED:
            self._end_stream(life, life.outcome())
            life.drop_texts()
        elif life.phase is Phase.PARKED:
            self._enqueue(now, life)

    def _deliver(self, life: Life, event: Shown) -> None:
        assert life.stream is not None
        self._deliveries.append(Deliver(life.stream, event))

    def _end_stream(self, life: Life, outcome: Outcome) -> None:
        """The last that it is shown: the stream is known no more."""
        assert life.stream is not None
        self._deliver(life, outcome)
        del self._streams[life.stream]
        life.stream = None

    def cancel(self, now: float, request_ids: tuple[str, ...]) -> None:
        for request_id in request_ids:
            if (life := self._lives.get(request_id)) and life.phase is not Phase.ENDED:
                self.fail(now, life, CancelledError("the request was cancelled", request_id=request_id))

    # Lives

    def _enqueue(self, now: float, life: Life) -> None:
        """Wait for a replica, unless the ids that are known end every choice already."""
        if life.ended:
            self._finish(now, life)
            return
        self.move(life, Phase.QUEUED)
        (self.quarantine.waiting if self.quarantine.suspects(life.request_id) else self._waiting).add(life)

    def interrupt(self, now: float, life: Life, reason: str) -> None:
        """A replica lost it, or never had it: replay it from the journal, in its place among those that wait."""
        self._withdraw(life)
        detail = {"attempt": life.entry.attempt, "reason": reason, "recomputed_tokens": life.recomputed_tokens}
        self.emit("request.replayed", life.request_id, **detail)
        if life.stream is None:
            self._park(now, life)
        else:
            self._enqueue(now, life)

    def _park(self, now: float, life: Life) -> None:
        """No client: nothing is computed until one comes back, or until the resume window has passed."""
        self._withdraw(life)
        if life.ended:
            self._finish(now, life)
            return
        self.move(life, Phase.PARKED)
        self._age(now, life)
        self.emit("request.parked", life.request_id, reason="no client reads it")

    def _finish(self, now: float, life: Life) -> None:
        finishes = tuple(finish for finish in life.finishes if finish)
        self._end(life, Finished(life.request_id, now, finishes))

    def fail(self, now: float, life: Life, error: EchelonError) -> None:
        self._withdraw(life)
        self._end(life, Finished(life.request_id, now, (), error.reason, error.message))
        self.emit("request.failed", life.request_id, reason=error.reason, message=error.message)

    def _end(self, life: Life, finished: Finished) -> None:
        self.record(finished)
        self._look_at(life, finished.finished_unix_s + self._config.resume_window_s)
        self.move(life, Phase.ENDED)
        if life.stream is not None:
            self._end_stream(life, life.outcome())
        life.drop_texts()

    def forget(self, life: Life) -> None:
        self.record(Forgotten(life.request_id))
        self.phases[life.phase] -= 1
        self._timers.discard(life.request_id)
        self.kept.discard(life.request_id)
        self.quarantine.forget(life.request_id)
        del self._lives[life.request_id]

    def _withdraw(self, life: Life) -> None:
        """Have its leader let go of it, if one has it."""
        if life.phase is Phase.RUNNING and (assigned := life.entry.assigned):
            self._router.abandon(assigned.replica, life.request_id, assigned.attempt)

    def move(self, life: Life, phase: Phase) -> None:
        self._waiting.discard(life)
        self.quarantine.moved(life, phase)
        self.phases[life.phase] -= 1
        self.phases[phase] += 1
        life.phase = phase
        self.kept.moved(life.entry, life.phase in (Phase.ENDED, Phase.PARKED))

    def accept(self, now: float, life: Life, run: TokenRun) -> None:
        """Journal and deliver what a run of the current attempt adds to a choice that goes on; no gap is before it."""
        first = len(life.entry.answers[run.choice].ids)
        new = run.ids[first - run.first_token :]
        ids, text, finish = life.take(run.choice, new)
        if ids:
            logprobs = run.logprobs[-len(new) :][: len(ids)]
            self.record(Tokens(run.request, run.attempt, first, ids, logprobs, run.choice))
            if life.first_token_unix_s is None:
                life.first_token_unix_s = now
            if life.stream is not None:
                self._deliver(life, life.delta(run.choice, first, ids, text))
        if finish or run.finish:
            life.finishes[run.choice] = finish or run.finish
            self._end_choice(now, life, run)

    def _end_choice(self, now: float, life: Life, run: TokenRun) -> None:
        """Tell the leader, unless it told us; the last choice ends the request."""
        if not run.finish and (assigned := life.entry.assigned):
            choice = None if life.ended else run.choice
            self._router.abandon(assigned.replica, life.request_id, assigned.attempt, choice)
        if life.ended:
            self._finish(now, life)

    # Time

    def make_room(self) -> None:
        """Forget what takes more memory than it may. Told once, until there is room again."""
        while request_id := self.kept.excess():
            if self.kept.forget_early():
                self.emit("requests.forgotten_early", "coordinator", first=request_id, limit_bytes=self.kept.max_bytes)
            self.forget(self._lives[request_id])

    def look_at_due(self, now: float) -> None:
        """What time alone does: deadlines, the resume window, clients that did not come back to a new coordinator."""
        while (request_id := self._timers.take_due(now)) is not None:
            self._age(now, self._lives[request_id])

    def _age(self, now: float, life: Life) -> None:
        """Do what is due, or look again when it will be."""
        due_unix_s, due = life.next_due(self._config.resume_window_s, REATTACH_S)
        if now < due_unix_s:
            self._look_at(life, due_unix_s)
        elif due is Due.FORGET:
            self.forget(life)
        elif due is Due.PARK:
            self._park(now, life)
        else:
            limit = life.sampling.max_tokens * life.sampling.n
            told = f"the deadline passed after {life.entry.generated_tokens} of at most {limit} tokens"
            late = f"{told}; give it longer, or ask for fewer tokens"
            self.fail(now, life, DeadlineError(late, request_id=life.request_id))

    def _look_at(self, life: Life, unix_s: float) -> None:
        self._timers.look_at(life.request_id, unix_s)
