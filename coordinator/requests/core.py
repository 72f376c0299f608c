"""The coordinator's core: from events of streams and replicas to effects.

Sans-IO, in the coordinator: `step(now, event) -> effects`, to be executed in order. Three fences guard the journal:
reports are heard only on the open link of their term and epoch, tokens only of the current attempt and only where the
journal ends. Requests live in `lives`, credits in `router`. Knows no bytes, sockets, threads or clock, and nothing of
how replicas come and go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.journal.state import Assigned, JournalState
from coordinator.journal.state import Prompted as PromptedRecord
from coordinator.requests import canary
from coordinator.requests.config import CoreConfig as CoreConfig
from coordinator.requests.events import (
    Cancel,
    Drain,
    Effect,
    Event,
    LinkClosed,
    LinkOpened,
    ModelChanged,
    ReplicaEnded,
    Reported,
    Send,
    StreamClosed,
    Submit,
    Tick,
)
from coordinator.requests.kept import Kept
from coordinator.requests.life import Life, NewText, Phase
from coordinator.requests.lives import Lives
from coordinator.requests.quarantine import Decision, room
from coordinator.requests.router import NOTHING, Link, Reason, Router, choose, too_large
from echelon.errors import InvalidRequestError, QuarantinedError, UnavailableError
from echelon.internal.block_hash import chain, root_hash
from echelon.internal.link import Fence, Prompted, Released, ReplicaHello, Report, TokenRun

PREFIX_BLOCKS = 2048  # of a prompt that are looked at: hashing is done on the loop that delivers tokens


@dataclass(frozen=True, slots=True)
class Counts:
    """Requests by where they stand."""

    queued: int
    running: int
    parked: int


class CoordinatorCore:
    """Takes up where the journal's state ends, and keeps that state."""

    def __init__(self, config: CoreConfig, new_text: NewText, state: JournalState) -> None:
        self._term = config.term
        self._replicas, self._canary_idle_s = config.replicas, config.canary_idle_s
        self._router = Router()
        self._lives = Lives(config, new_text, state, self._router)
        self._restored = False
        self._reserves = False  # a replica, for a suspect

    def step(self, now: float, event: Event) -> list[Effect]:
        """The effects of one event: appends, then deliveries, then commands, then what there is to tell."""
        if not self._restored:
            self._lives.restore(now)
            self._restored = True
        self._lives.look_at_due(now)  # first, so that nothing is shown to a stream in the step that forgets it
        self._lives.make_room()
        match event:
            case Reported(report):
                self._take_report(now, report)
            case Submit():
                self._lives.submit(now, event)
            case StreamClosed(stream):
                self._lives.close_stream(now, stream)
            case Cancel(request_ids):
                self._lives.cancel(now, request_ids)
            case LinkOpened(fence, hello):
                self._open_link(now, fence, hello)
            case LinkClosed(fence):
                self._router.close(fence)
            case ReplicaEnded(fence, reason):
                if event.step_broke:
                    self._count_break(now, event)
                self._end_epoch(now, fence.replica, fence.epoch, reason)
            case Drain():
                self._lives.draining = True
            case ModelChanged():
                self._forget_all(now)
            case Tick():
                pass
        self._assign(now)
        for kind, link, why in canary.look(now, self._router.links.values(), self._canary_idle_s):
            self._lives.emit(kind, f"replica/{link.fence.replica}", epoch=link.fence.epoch, reason=why)
        return self._lives.take_effects([Send(command) for command in self._router.take_commands()])

    @property
    def counts(self) -> Counts:
        """Requests by where they stand, ended ones left out."""
        phases = self._lives.phases
        return Counts(phases[Phase.QUEUED], phases[Phase.RUNNING], phases[Phase.PARKED])

    @property
    def remembered(self) -> int:
        """Requests known by their id, ended ones included."""
        return len(self._lives)

    @property
    def kept(self) -> Kept:
        """What requests take that are only remembered."""
        return self._lives.kept

    def affinity_hits(self, replica: int) -> int:
        """Requests that came to a replica for their prefix, since its epoch began or this coordinator did."""
        return self._router.affinity_hits(replica)

    def is_open(self, request_id: str) -> bool:
        """Whether a request is known and has not ended: what a cancel would cancel."""
        life = self._lives.get(request_id)
        return life is not None and life.phase is not Phase.ENDED

    def _open_link(self, now: float, fence: Fence, hello: ReplicaHello) -> None:
        """Reconcile what the leader holds with what it should hold."""
        link = Link(fence, hello)
        if fence.term != self._term or not self._router.open(link):
            self._lives.emit("link.refused", str(fence.replica), term=fence.term, epoch=fence.epoch)
            return
        self._end_epoch(now, fence.replica, fence.epoch - 1, "a later epoch serves")
        wanted = {(life.request_id, life.entry.attempt): life for life in self._lives.running_on(fence.replica)}
        for running in hello.running:
            life = self._lives.get(running.request)
            link.hold(running.request, running.attempt, life.size if life else NOTHING)
            adopted = wanted.pop((running.request, running.attempt), None)
            if adopted is None:
                link.abandon(running.request, running.attempt)
                continue
            for choice in adopted.ended_choices():  # an end by a stop string may be news to the leader
                link.abandon(running.request, running.attempt, choice)
        for life in reversed(wanted.values()):
            life.reached = life.entry.attempt <= hello.last_attempt
            self._lives.interrupt(now, life, "its leader does not hold it")

    def _end_epoch(self, now: float, replica: int, epoch: int, reason: str) -> None:
        """Up to this epoch nothing of the replica is heard again; its requests go first, in their order."""
        self._router.end(replica, epoch)
        for life in reversed(self._lives.running_on(replica)):
            assigned = life.entry.assigned
            if assigned and assigned.epoch <= epoch:
                self._lives.interrupt(now, life, reason)

    def _count_break(self, now: float, event: ReplicaEnded) -> None:
        """Against the requests that were in the step, or all that ran there where nobody can say which were."""
        fence, quarantine = event.fence, self._lives.quarantine
        running = [life for life in self._lives.running_on(fence.replica) if life.entry.epoch == fence.epoch]
        inside = set(event.requests) or {life.request_id for life in running}
        for life in running:
            if life.request_id not in inside:
                continue
            decision, why = quarantine.broke(life.request_id, alone=len(inside) == 1)
            if decision is Decision.QUARANTINE:
                message = f"{why}: {event.reason}"
                self._lives.fail(now, life, QuarantinedError(message, request_id=life.request_id))
                self._lives.emit("request.quarantined", life.request_id, replica=fence.replica, reason=why)
            else:
                self._lives.emit("request.suspected", life.request_id, decision=decision.value, reason=why)

    def _forget_all(self, now: float) -> None:
        """Whoever still waits is told to come again."""
        for life in self._lives:
            if life.phase is not Phase.ENDED:
                again = UnavailableError("another model is served now", request_id=life.request_id)
                self._lives.fail(now, life, again)
            self._lives.forget(life)

    def _take_report(self, now: float, report: Report) -> None:
        """Journal and deliver what it brings, then acknowledge it."""
        link = self._router.heard(report.fence)
        if link is None:
            self._lives.emit("report.refused", str(report.fence.replica), report_seq=report.report_seq)
            return
        for prompted in report.prompted:
            link.computed(prompted.request, prompted.attempt)
            self._take_prompted(prompted)
        for run in report.runs:
            link.token_s = now
            self._take_run(now, run)
        for released in report.released:
            link.release(released.request, released.attempt)
            self._take_released(now, released)
        if report.stats:
            link.blocks_referenced = report.stats.blocks_referenced
        link.acknowledge(report.report_seq)

    def _current(self, request_id: str, attempt: int) -> Life | None:
        """The request, if this attempt is its current one. Whatever older attempts made is made again."""
        life = self._lives.get(request_id)
        return life if life and life.phase is Phase.RUNNING and life.entry.attempt == attempt else None

    def _take_prompted(self, prompted: Prompted) -> None:
        """Told once for each attempt; the first one counts. Not worth a record unless there is something to tell.

        What a replay finds cached is its own request's: one that has tokens had computed its prompt before.
        """
        life = self._current(prompted.request, prompted.attempt)
        if life is None or life.entry.prompted:
            return
        replayed = life.entry.recomputed_tokens and life.entry.generated_tokens
        cached_tokens = 0 if replayed else prompted.cached_tokens
        if cached_tokens or prompted.prompt_logprobs:
            logprobs = prompted.prompt_logprobs
            self._lives.record(PromptedRecord(prompted.request, prompted.attempt, cached_tokens, logprobs))

    def _take_run(self, now: float, run: TokenRun) -> None:
        life = self._current(run.request, run.attempt)
        if life is None or life.finishes[run.choice]:  # what a leader made of a choice before it heard of its end
            return
        held = len(life.entry.answers[run.choice].ids)
        if run.first_token > held:
            gap = f"a run starts at token {run.first_token}, the journal ends at {held}"
            self._lives.interrupt(now, life, gap)
        else:
            self._lives.accept(now, life, run)
            if not self._lives.quarantine.idle and self._lives.quarantine.passes(life):
                self._lives.emit("request.cleared", life.request_id, reason="alone, it broke no step")

    def _take_released(self, now: float, released: Released) -> None:
        """After a finish the request has ended already; what is released before is refused, or to begin anew."""
        life = self._current(released.request, released.attempt)
        if life and released.error:
            error = InvalidRequestError(released.error, reason=released.reason, request_id=released.request)
            self._lives.fail(now, life, error)
        elif life:
            life.apart = True
            self._lives.interrupt(now, life, "its leader let go of it")

    def _assign(self, now: float) -> None:
        """In their order, while a replica has credits for the first. Suspects go first, to a replica of their own."""
        if not self._lives.quarantine.idle or self._reserves:
            self._assign_suspect(now)
        while life := self._lives.first_queued():
            size = life.size
            if error := too_large(self._router.links.values(), size):
                self._lives.fail(now, life, error)
                continue
            able = self._router.able(size)
            if not able:
                return
            prefix = self._prefix(life, able[0].hello.block_tokens)
            link, reason = choose(able, size, prefix)
            link.prefixes.hits += reason is Reason.PREFIX
            self._assign_to(now, life, link, prefix)

    def _assign_suspect(self, now: float) -> None:
        """One at a time: nobody comes to its replica meanwhile, and who runs there is replayed later."""
        quarantine, links = self._lives.quarantine, self._router.links
        suspect, replayed = quarantine.waiting.first, quarantine.replayed
        if replayed is not None and replayed.entry.assigned is not None:
            reserved = links.get(replayed.entry.assigned.replica)
        else:
            reserved = room(list(links.values()), self._replicas) if suspect else None
        for link in links.values():
            link.reserved = link is reserved
        self._reserves = reserved is not None
        if suspect is None or reserved is None or replayed is not None:
            return
        if error := too_large(links.values(), suspect.size):
            self._lives.fail(now, suspect, error)
        elif not reserved.held:
            quarantine.replay(suspect)
            self._assign_to(now, suspect, reserved, ())
        else:
            for life in reversed(self._lives.running_on(reserved.fence.replica)):
                self._lives.interrupt(now, life, "a request that may break steps is replayed alone")

    def _prefix(self, life: Life, block_tokens: int) -> Sequence[bytes]:
        """What its prompt is known again by, once there is a choice between replicas."""
        if self._replicas < 2:
            return ()
        prompt = life.entry.request.prompt[: PREFIX_BLOCKS * block_tokens]
        return chain(root_hash(life.cache_salt), prompt, block_tokens)

    def _assign_to(self, now: float, life: Life, link: Link, prefix: Sequence[bytes]) -> None:
        recomputed = life.entry.recomputed_tokens + life.recomputed_tokens
        attempt = self._lives.next_attempt()
        self._lives.record(Assigned(life.request_id, attempt, link.fence.replica, link.fence.epoch, recomputed))
        self._lives.move(life, Phase.RUNNING)
        link.assign(life.assign(now, attempt), life.size, prefix)
