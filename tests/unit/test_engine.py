"""The engine against a fake coordinator and a fake device: any interleaving ends with the tokens of an undisturbed run.

The device executes plans as ranks do: state a slot, a cache addressed through block tables, and a model whose next id
hashes all that it finds in that cache.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from echelon.internal.link import (
    CANARY,
    Abandon,
    Assign,
    Command,
    Fence,
    Finish,
    Logprob,
    Progress,
    Prompted,
    Released,
    ReplicaHello,
    Report,
    Running,
    TokenRun,
)
from tests.unit.paged_device import STOP_ID, PagedDevice, answer, prompt_scores, request
from worker.engine import (
    Commanded,
    Completed,
    Drain,
    EngineCore,
    EngineLimits,
    Event,
    LinkClosed,
    LinkOpened,
    RunPlan,
    SendReport,
)
from worker.plan import StepPlan

FENCE = Fence(term=1, replica=0, epoch=1)


class Replica:
    """An engine, its device and the plans between them."""

    def __init__(self, limits: EngineLimits, fence: Fence = FENCE) -> None:
        self.engine = EngineCore(fence, limits)
        self.device = PagedDevice(limits.block_tokens)
        self.plans: deque[StepPlan] = deque()

    def do(self, event: Event) -> list[Report]:
        reports: list[Report] = []
        for effect in self.engine.step(0.0, event):
            match effect:
                case RunPlan((plan,)):
                    self.plans.append(plan)
                case SendReport(report):
                    reports.append(report)
        assert len(self.plans) <= 2
        self.engine.check_integrity()
        return reports

    def open_link(self, term: int = 1) -> list[Report]:
        return self.do(LinkOpened(term))

    def command(self, *items: Assign | Abandon, acked: int = 0, fence: Fence | None = None) -> list[Report]:
        assigns = tuple(item for item in items if isinstance(item, Assign))
        abandons = tuple(item for item in items if isinstance(item, Abandon))
        return self.do(Commanded(Command(fence or self.engine.fence, acked, assigns, abandons)))

    def complete(self) -> list[Report]:
        return self.do(Completed(self.device.run(self.plans.popleft())))

    def finish(self) -> list[Report]:
        reports: list[Report] = []
        while self.plans:
            reports += self.complete()
        return reports

    @property
    def counters(self) -> dict[str, int]:
        return dict(self.engine.stats().counters)


def limits(max_running: int = 4, kv_blocks: int = 32, max_step_tokens: int = 16, unacked: int = 100) -> EngineLimits:
    return EngineLimits(max_running, kv_blocks, 4, max_step_tokens, 64, unacked)


def assign(
    name: str, prompt: int = 5, max_tokens: int = 4, *, attempt: int = 1, stop: bool = False, choices: int = 1
) -> Assign:
    """All prompts begin alike."""
    progress = [Progress(choice) for choice in range(choices)]
    stops = (STOP_ID,) if stop else ()
    return request(name, range(20, 20 + prompt), max_tokens, attempt=attempt, choices=progress, stop_token_ids=stops)


def resumed(assign: Assign, attempt: int, *generated: int) -> Assign:
    """The assignment again, for its first choice with these ids."""
    return replace(assign, attempt=attempt, choices=(Progress(0, generated),))


def ids_of(reports: list[Report], name: str, attempt: int = 1, choice: int = 0) -> list[int]:
    """The ids of one choice of one attempt, which must come without gap and in order."""
    ids: list[int] = []
    for run in (run for report in reports for run in report.runs):
        if (run.request, run.attempt, run.choice) == (name, attempt, choice):
            assert run.first_token == len(ids)
            ids += run.ids
    return ids


def released_in(reports: list[Report]) -> list[Released]:
    return [released for report in reports for released in report.released]


def test_one_step_ahead_every_request_gets_the_tokens_it_gets_alone() -> None:
    replica = Replica(limits(max_step_tokens=7))
    requests = [assign(f"r{n}", prompt=3 + 4 * n, max_tokens=9 - n) for n in range(6)]
    replica.open_link()
    reports = replica.command(*requests)
    assert len(replica.plans) == 2, "the second plan does not wait for the first result"
    reports += replica.finish()
    for each in requests:
        assert ids_of(reports, each.request) == answer(each)
    assert {released.request for released in released_in(reports)} == {each.request for each in requests}
    assert [report.report_seq for report in reports] == list(range(1, len(reports) + 1))
    assert replica.counters["chunked_prompts"] >= 3
    assert replica.engine.stats().blocks_referenced == 0


def test_the_last_run_carries_the_finish_and_the_same_report_the_release() -> None:
    replica = Replica(limits())
    replica.open_link()
    replica.command(asked := request("a", range(5), 2, logprobs=0))
    first, last = replica.finish()
    ids = answer(asked)
    assert first.runs == (TokenRun("a", 0, 1, 0, (ids[0],), (Logprob(-float(ids[0])),)),)
    assert last.runs == (TokenRun("a", 0, 1, 1, (ids[1],), (Logprob(-float(ids[1])),), Finish.LENGTH),)
    assert (first.released, last.released) == ((), (Released("a", 1),))
    assert last.stats and (last.stats.blocks_referenced, last.stats.blocks_cached, last.stats.step) == (0, 1, 2)


def test_cancelled_requests_hold_nothing_from_then_on() -> None:
    replica = Replica(limits())
    replica.open_link()
    replica.command(assign("a", max_tokens=20), assign("b", max_tokens=20), assign("c", prompt=20))
    replica.complete()
    assert replica.command(Abandon("a", 1), Abandon("b", 1), Abandon("c", 1)) == []
    assert replica.engine.stats().blocks_referenced == 0
    (report,) = replica.finish()
    assert not report.runs, "what was in flight says nothing more"
    assert report.released == (Released("a", 1), Released("b", 1), Released("c", 1))


def test_once_all_is_released_no_step_computes_any_of_it() -> None:
    """So that a request that is given to a replica which holds nothing is alone in its steps."""
    replica = Replica(limits())
    replica.open_link()
    replica.command(assign("a", max_tokens=20), assign("b", max_tokens=20))
    (report,) = replica.command(Abandon("a", 1))
    assert report.released == (Released("a", 1),), "b is held"
    assert replica.command(Abandon("b", 1)) == [] and replica.engine.in_steps(1, 2) == ("a", "b")
    (hello,) = replica.open_link()[:1]
    assert hello.hello and hello.hello.running == (Running("b", 1),), "for steps compute it"
    assert replica.complete() == [] and replica.engine.in_steps(1, 2) == ("a", "b")
    (report,) = replica.complete()
    assert report.released == (Released("b", 1),) and replica.engine.in_steps(1, 9) == ()


def test_what_comes_next_waits_for_no_release() -> None:
    replica = Replica(limits())
    replica.open_link()
    replica.command(assign("a", max_tokens=20))
    assert replica.command(Abandon("a", 1)) == []
    (report,) = replica.command(assign("b"))
    assert report.released == (Released("a", 1),)
    assert len(ids_of(replica.finish(), "b")) == 4


def test_abandoning_what_is_not_held_is_answered_and_touches_nothing_else() -> None:
    replica = Replica(limits())
    replica.open_link()
    replica.command(assign("a", attempt=2))
    (report,) = replica.command(Abandon("a", 1), Abandon("other", 5))
    assert report.released == (Released("a", 1), Released("other", 5))
    assert len(ids_of(replica.finish(), "a", attempt=2)) == 4


def test_choices_are_let_go_of_one_by_one_and_released_with_the_last() -> None:
    replica = Replica(limits())
    replica.open_link()
    replica.command(asked := assign("a", max_tokens=6, choices=3))
    reports = replica.complete()
    assert replica.command(Abandon("a", 1, 0), Abandon("a", 1, 7), Abandon("a", 2, 1), Abandon("other", 1, 0)) == []
    assert replica.command(Abandon("a", 1, 0), Abandon("a", 1, 1), Abandon("a", 1, 2)) == []
    assert replica.engine.stats().blocks_referenced == 0
    (report,) = replica.finish()
    assert report.released == (Released("a", 1),) and replica.counters["released"] == 1
    replica.command(replace(asked, attempt=2))
    reports = replica.finish()
    assert [ids_of(reports, "a", 2, choice) for choice in range(3)] == [answer(asked, choice) for choice in range(3)]
    assert released_in(reports) == [Released("a", 2)]


def test_a_prompt_is_told_once_an_attempt_before_its_first_token_with_its_scores() -> None:
    replica = Replica(limits(max_step_tokens=4))
    replica.open_link()
    replica.command(asked := request("a", range(9), 3, prompt_logprobs=1, choices=[Progress(0), Progress(1)]))
    reports = replica.finish()
    told = [(number, prompted) for number, report in enumerate(reports) for prompted in report.prompted]
    assert told == [(0, Prompted("a", 1, 0, prompt_scores(asked)))] and reports[0].runs
    replica.command(replace(asked, attempt=2, sampling=replace(asked.sampling, prompt_logprobs=None)))
    assert [prompted for report in replica.finish() for prompted in report.prompted] == [Prompted("a", 2, 8)]


def test_a_canary_counts_for_no_attempt_that_came() -> None:
    """Its numbers are times, and higher than those of all requests."""
    replica = Replica(limits())
    replica.open_link()
    replica.command(assign("a", attempt=7), assign(CANARY, attempt=1_700_000_000_000, max_tokens=1))
    (hello, *_) = replica.open_link()
    assert hello.hello and hello.hello.last_attempt == 7


def test_a_newer_attempt_replaces_an_older_one_and_no_other() -> None:
    replica = Replica(limits())
    replica.open_link()
    replica.command(asked := assign("a"))
    ids = answer(asked)
    (first,) = replica.complete()
    (report,) = replica.command(resumed(asked, 2, *first.runs[0].ids))
    assert report.released == (Released("a", 1),)
    assert replica.command(asked, replace(asked, attempt=2)) == []
    runs = [run for report in replica.finish() for run in report.runs]
    assert [(run.attempt, run.first_token, run.ids) for run in runs] == [(2, n, (ids[n],)) for n in (1, 2, 3)]
    assert replica.counters["replayed_requests"] == 1


def test_what_can_never_fit_is_released_with_the_reason_and_the_rest_runs() -> None:
    replica = Replica(limits())
    replica.open_link()
    (report,) = replica.command(assign("big", prompt=60, max_tokens=5), assign("a"))
    (released,) = report.released
    assert released.request == "big" and "60 + max_tokens 5 = 65 tokens exceed max_context 64" in released.error
    assert len(ids_of(replica.finish(), "a")) == 4


def test_replayed_ids_that_end_the_request_are_answered_at_once() -> None:
    replica = Replica(limits())
    replica.open_link()
    (report,) = replica.command(resumed(assign("a", max_tokens=2), 1, 3, 4))
    assert report.runs == (TokenRun("a", 0, 1, 2, (), finish=Finish.LENGTH),)
    assert report.released == (Released("a", 1),) and not replica.plans


@pytest.mark.parametrize("fence", [Fence(1, 0, 1), Fence(2, 0, 0), Fence(2, 0, 2), Fence(2, 1, 1)])
def test_a_command_of_another_fence_is_refused(fence: Fence) -> None:
    replica = Replica(limits())
    replica.open_link(term=2)
    assert replica.command(assign("a"), fence=fence) == [] and not replica.plans
    assert replica.counters["refused_commands"] == 1


def test_a_coordinator_of_an_older_term_gets_no_link() -> None:
    replica = Replica(limits())
    replica.open_link(term=3)
    assert replica.open_link(term=2) == []
    replica.command(assign("a"))
    assert all(report.fence == Fence(3, 0, 1) for report in replica.finish())
    assert replica.counters["refused_commands"] == 1


def test_reports_are_kept_until_acknowledged_and_told_again_under_the_new_term() -> None:
    replica = Replica(limits())
    replica.open_link()
    replica.command(assign("a", max_tokens=3), assign("b", max_tokens=9))
    sent = replica.complete()
    replica.do(LinkClosed())
    assert replica.complete() == [] and replica.complete() == [], "nobody listens, and it goes on"
    hello, *again = replica.open_link(term=2)
    assert hello.report_seq == 0 and hello.hello == ReplicaHello(
        slots=4,
        kv_blocks=32,
        block_tokens=4,
        max_context=64,
        running=(Running("a", 1), Running("b", 1)),
        last_attempt=1,
    ), "a has ended, but the coordinator may not know"
    assert again[0] == replace(sent[0], fence=Fence(2, 0, 1))
    assert [report.report_seq for report in again] == [1, 2, 3]
    replica.command(acked=3)
    hello, *again = replica.open_link(term=2)
    assert hello.hello and hello.hello.running == (Running("b", 1),) and again == []


def test_without_acknowledgements_it_pauses_and_goes_on_with_them() -> None:
    replica = Replica(limits(unacked=5))
    replica.open_link()
    replica.command(asked := assign("a", max_tokens=20))
    replica.do(LinkClosed())
    replica.finish()
    _, *kept = replica.open_link(term=2)
    assert len(kept) == 5 and replica.engine.stats().step == 5
    replica.command(acked=2)
    reports = replica.finish()
    assert [report.report_seq for report in reports] == [6, 7]
    while replica.plans or replica.command(acked=reports[-1].report_seq) or replica.plans:
        reports += replica.finish()
    assert ids_of(kept + reports, "a") == answer(asked)


def effects_of(engine: EngineCore, event: Event, plans: deque[StepPlan]) -> str:
    """P and D for each plan and drain of one event, in their order."""
    told = ""
    for effect in engine.step(0.0, event):
        if isinstance(effect, RunPlan):
            plans.append(effect.plans[0])
        told += {RunPlan: "P", Drain: "D"}.get(type(effect), "")
    return told


@pytest.mark.parametrize(("stages", "expected"), [(1, ["P", "P", "P", ""]), (2, ["PD", "PD", "PD", ""])])
def test_stages_are_told_once_when_no_plan_comes_before_results(stages: int, expected: list[str]) -> None:
    """A constrained request alone: each step needs the id of the one before, and the last has nothing after it."""
    engine, device = EngineCore(FENCE, EngineLimits(4, 32, 4, 16, 64, stages=stages, depth=stages)), PagedDevice(4)
    plans: deque[StepPlan] = deque()
    asked = request("a", [5, 6], 3, grammar="digits")
    effects_of(engine, LinkOpened(1), plans)
    told = [effects_of(engine, Commanded(Command(FENCE, 0, (asked,))), plans)]
    while plans:
        again = effects_of(engine, Commanded(Command(FENCE, 0)), plans)
        assert again == "", "told once"
        told.append(effects_of(engine, Completed(device.run(plans.popleft())), plans))
    assert told == expected


def test_a_pause_for_want_of_acknowledgements_drains_too() -> None:
    engine, device = EngineCore(FENCE, EngineLimits(4, 32, 4, 16, 64, 2, stages=2, depth=2)), PagedDevice(4)
    plans: deque[StepPlan] = deque()
    effects_of(engine, LinkOpened(1), plans)
    assert effects_of(engine, Commanded(Command(FENCE, 0, (request("a", [5], 9),))), plans) == "PPD"
    told = [effects_of(engine, Completed(device.run(plans.popleft())), plans) for _ in range(2)]
    assert told == ["", ""] and not plans, "two reports may be unacknowledged"
    assert effects_of(engine, Commanded(Command(FENCE, 1)), plans) == "PD"
    assert effects_of(engine, Commanded(Command(FENCE, 2)), plans) == "PD"


@dataclass
class Book:
    """What the fake coordinator knows of a request, by choice; over: those that have ended or that it does not want."""

    asked: Assign
    whole: list[list[int]]
    ids: list[list[int]]
    over: set[int] = field(default_factory=set)
    attempt: int = 0
    wanted: bool = True  # False: parked
    assigned: bool = False

    @property
    def finished(self) -> bool:
        return len(self.over) == len(self.ids)


class Interleavings(RuleBasedStateMachine):
    """Any order of commands, results, deliveries, cuts and coordinator restarts; a cut loses what is on its way."""

    @initialize(
        max_running=st.integers(1, 3), kv_blocks=st.integers(4, 12), budget=st.integers(1, 9), unacked=st.integers(1, 6)
    )
    def start(self, max_running: int, kv_blocks: int, budget: int, unacked: int) -> None:
        self.replica = Replica(limits(max_running, kv_blocks, budget, unacked))
        self.books: dict[str, Book] = {}
        self.term = 1
        self.linked = False
        self.up: deque[Report] = deque()
        self.down: deque[Command] = deque()
        self.seen = 0

    def fence(self) -> Fence:
        return Fence(self.term, 0, 1)

    def send(self, *items: Assign | Abandon) -> None:
        """Only once the hello has been heard."""
        assigns = tuple(item for item in items if isinstance(item, Assign))
        abandons = tuple(item for item in items if isinstance(item, Abandon))
        self.down.append(Command(self.fence(), self.seen, assigns, abandons))

    def assign(self, name: str) -> None:
        book = self.books[name]
        book.attempt += 1
        book.assigned = True
        left = tuple(Progress(choice, tuple(ids)) for choice, ids in enumerate(book.ids) if choice not in book.over)
        self.send(replace(book.asked, attempt=book.attempt, choices=left))

    @rule(
        prompt=st.integers(1, 9),
        max_tokens=st.integers(1, 7),
        stop=st.booleans(),
        choices=st.sampled_from((1, 1, 2, 3)),
    )
    def submit(self, prompt: int, max_tokens: int, stop: bool, choices: int) -> None:
        name = f"r{len(self.books)}"
        asked = assign(name, prompt, max_tokens, stop=stop, choices=choices)
        self.books[name] = Book(
            asked, [answer(asked, choice) for choice in range(choices)], [[] for _ in range(choices)]
        )
        if self.linked:
            self.assign(name)

    @rule(pick=st.integers(0, 9), choice=st.integers(0, 2))
    @precondition(lambda self: self.linked and self.books)
    def drop_choice(self, pick: int, choice: int) -> None:
        name = list(self.books)[pick % len(self.books)]
        book = self.books[name]
        if book.assigned and choice < len(book.ids):
            book.over.add(choice)
            self.send(Abandon(name, book.attempt, choice))

    @rule(pick=st.integers(0, 9))
    @precondition(lambda self: self.linked and self.books)
    def park_or_resume(self, pick: int) -> None:
        name = list(self.books)[pick % len(self.books)]
        book = self.books[name]
        if book.finished:
            return
        book.wanted = not book.wanted
        if book.wanted:
            self.assign(name)
        elif book.assigned:
            book.assigned = False
            self.send(Abandon(name, book.attempt))

    @rule()
    @precondition(lambda self: self.replica.plans)
    def complete(self) -> None:
        self.up.extend(self.replica.complete())

    @rule()
    @precondition(lambda self: self.down)
    def deliver_command(self) -> None:
        self.up.extend(self.replica.do(Commanded(self.down.popleft())))

    @rule()
    @precondition(lambda self: self.up)
    def deliver_report(self) -> None:
        self.hear(self.up.popleft())

    @rule()
    @precondition(lambda self: self.linked)
    def acknowledge(self) -> None:
        self.send()

    @rule(restart=st.booleans())
    def cut_and_open(self, restart: bool) -> None:
        self.cut()
        if restart:
            self.term += 1
            self.seen = 0
        self.open()

    @rule()
    def cut(self) -> None:
        self.linked = False
        self.up.clear()
        self.down.clear()
        assert self.replica.do(LinkClosed()) == []

    @rule()
    @precondition(lambda self: not self.linked and not self.up)
    def open(self) -> None:
        self.up.extend(self.replica.open_link(self.term))

    def hear(self, report: Report) -> None:
        assert report.fence == self.fence()
        if report.hello:
            self.linked = True
            self.reconcile(report.hello)
            return
        if self.seen:
            assert report.report_seq <= self.seen + 1, "a report is missing"
        if report.report_seq <= self.seen:
            return
        self.seen = report.report_seq
        for run in report.runs:
            self.take(run)
        for released in report.released:
            assert not released.error
            book = self.books[released.request]
            assert released.attempt != book.attempt or book.finished or not book.wanted, "released, but not ended"

    def reconcile(self, hello: ReplicaHello) -> None:
        running = {running.request: running for running in hello.running}
        for name, book in self.books.items():
            held = running.get(name)
            expected = book.wanted and not book.finished
            if held and (not expected or held.attempt != book.attempt):
                self.send(Abandon(name, held.attempt))
            if expected and not (held and held.attempt == book.attempt and book.assigned):
                self.assign(name)
            elif expected:
                self.send(*(Abandon(name, book.attempt, choice) for choice in book.over))

    def take(self, run: TokenRun) -> None:
        book = self.books[run.request]
        assert run.attempt <= book.attempt
        if run.attempt < book.attempt or not book.wanted:
            return
        ids = book.ids[run.choice]
        if run.choice in book.over and run.first_token > len(ids):
            return  # it was dropped, and other ids of it went with a link
        assert run.first_token <= len(ids), "an id is missing"
        known = ids[run.first_token :]
        assert list(run.ids[: len(known)]) == known[: len(run.ids)], "another id than before"
        if run.choice in book.over:
            return
        ids += run.ids[len(known) :]
        assert ids == book.whole[run.choice][: len(ids)]
        if run.finish:
            assert ids == book.whole[run.choice]
            book.over.add(run.choice)

    @invariant()
    def bounded(self) -> None:
        assert len(self.replica.plans) <= 2

    def teardown(self) -> None:
        if not hasattr(self, "replica"):
            return
        self.cut_and_open(restart=False)
        for book in self.books.values():
            book.wanted = True
        for _ in range(1000):
            if self.up:
                self.deliver_report()
            elif self.replica.plans:
                self.complete()
            elif self.down:
                self.deliver_command()
            elif all(book.finished for book in self.books.values()):
                break
            else:
                self.acknowledge()
        assert all(book.finished for book in self.books.values())
        self.replica.command(acked=self.seen)
        (hello,) = self.replica.open_link(self.term)
        assert hello.hello and hello.hello.running == ()
        assert hello.stats and hello.stats.blocks_referenced == 0


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    phases=(Phase.generate,),  # add Phase.shrink to debug: it takes minutes
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
