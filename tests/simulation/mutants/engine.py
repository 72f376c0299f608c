"""Mutants of the engine: the leader's reports, who is computed when, and what is kept of it.

Each breaks one line of production code while its patch is in place; its docstring is the promise that this breaks.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from echelon.internal import block_hash
from echelon.internal.link import Abandon, Progress
from tests.simulation.mutants.registry import mutant, returning, without
from worker import draft, lanes, prefix_cache, scheduler
from worker.block_pool import BlockPool
from worker.cohorts import Cohorts
from worker.draft import Draft
from worker.engine import Drain, Effect, EngineCore, Event, LinkClosed
from worker.lanes import Lanes
from worker.plan import Admit, StepResult, Told
from worker.scheduler import Scheduler
from worker.sequence import NO_COHORT, Outcome, Request, Sequence


@mutant
def reports_kept_only_while_linked(patch: pytest.MonkeyPatch) -> None:
    """A leader keeps every report until a coordinator has acknowledged it, over any number of links."""
    original = EngineCore.step

    def step(self: EngineCore, now: float, event: Event) -> list[Effect]:
        if isinstance(event, LinkClosed):
            self._unacked.clear()
        return original(self, now, event)

    patch.setattr(EngineCore, "step", step)


@mutant
def priority_ignored_by_the_scheduler(patch: pytest.MonkeyPatch) -> None:
    """Of requests that a replica holds the one with the lower priority begins first."""
    original = Sequence.of

    def of(request: Request, progress: Progress) -> Sequence:
        sequence = original(request, progress)
        sequence.order = (0, *sequence.order[1:])
        return sequence

    patch.setattr(Sequence, "of", of)


@mutant
def one_abandoned_choice_releases_all(patch: pytest.MonkeyPatch) -> None:
    """The end of one choice leaves the others running."""
    original = EngineCore._abandon
    patch.setattr(EngineCore, "_abandon", lambda self, abandon: original(self, replace(abandon, choice=None)))


@mutant
def abandoned_choices_go_on(patch: pytest.MonkeyPatch) -> None:
    """A choice that a stop string ended is computed no further."""
    original = EngineCore._abandon

    def abandon(self: EngineCore, abandon: Abandon) -> None:
        if abandon.choice is None:
            original(self, abandon)

    patch.setattr(EngineCore, "_abandon", abandon)


@mutant
def preempted_without_its_ids(patch: pytest.MonkeyPatch) -> None:
    """A preempted sequence goes on with all its ids."""
    original = Scheduler._preempt

    def preempt(self: Scheduler, sequence: Sequence) -> None:
        original(self, sequence)
        del sequence.ids[sequence.prompt_tokens :]
        sequence.given = sequence.prompt_tokens

    patch.setattr(Scheduler, "_preempt", preempt)


@mutant
def choices_draw_the_same(patch: pytest.MonkeyPatch) -> None:
    """Each choice draws from noise of its own."""
    patch.setattr(draft, "Admit", lambda slot, choice, *rest: Admit(slot, 0, *rest))


@mutant
def drains_not_sent(patch: pytest.MonkeyPatch) -> None:
    """Stages that get no further plan return the ids that are on their way."""
    without(patch, EngineCore, "_plan_ahead", Drain)


@mutant
def steps_wait_for_no_ids(patch: pytest.MonkeyPatch) -> None:
    """A step that reads sampled ids waits until they are back at the first stage."""
    returning(patch, Draft, "plan", lambda plan: replace(plan, after=0))


@mutant
def steps_wait_for_the_ids_before_theirs(patch: pytest.MonkeyPatch) -> None:
    """A step waits for all of the ids that it reads."""
    returning(patch, Draft, "plan", lambda plan: replace(plan, after=max(plan.after - 1, 0)))


@mutant
def lanes_wait_for_their_own_ids_alone(patch: pytest.MonkeyPatch) -> None:
    """Data ranks go forward and back in one order of operations, that of the first lane."""
    patch.setattr(lanes, "max", lambda afters: next(iter(afters)), raising=False)


@mutant
def results_of_another_lane(patch: pytest.MonkeyPatch) -> None:
    """A data rank's ids go to the sequences of its own lane."""
    original = Lanes.commit

    def commit(self: Lanes, result: StepResult) -> Outcome:
        flights = [scheduler.flights[0] for scheduler in self.schedulers]
        awaited = [(len(flight.sampled), len(flight.scored)) for flight in flights]
        if len(awaited) == 2 and awaited[0] == awaited[1]:
            half = awaited[0][0]
            ids, logprobs = result.ids[half:] + result.ids[:half], result.logprobs[half:] + result.logprobs[:half]
            result = replace(result, ids=ids, logprobs=logprobs)
        return original(self, result)

    patch.setattr(Lanes, "commit", commit)


@mutant
def cohorts_never_left(patch: pytest.MonkeyPatch) -> None:
    """Turns go to cohorts that have sequences."""
    patch.setattr(Cohorts, "leave", lambda self, sequence: setattr(sequence, "cohort", NO_COHORT))


@mutant
def blocks_not_freed(patch: pytest.MonkeyPatch) -> None:
    """Blocks come back when their sequence ends."""
    patch.setattr(BlockPool, "free", lambda self, blocks: None)
    patch.setattr(BlockPool, "check_integrity", lambda self, tables: None)


@mutant
def block_hash_without_salt(patch: pytest.MonkeyPatch) -> None:
    """Prefixes are shared under one salt alone."""
    for module in (scheduler, prefix_cache):
        patch.setattr(module, "root_hash", lambda salt: b"")


@mutant
def block_hash_without_its_parent(patch: pytest.MonkeyPatch) -> None:
    """A cached block stands for its tokens and for all before them."""
    original = block_hash.chain

    def chain(parent: bytes, ids: tuple[int, ...], block_tokens: int) -> list[bytes]:
        starts = range(0, len(ids) - block_tokens + 1, block_tokens)
        return [original(b"", ids[start : start + block_tokens], block_tokens)[0] for start in starts]

    for module in (scheduler, prefix_cache):
        patch.setattr(module, "chain", chain)


@mutant
def cached_block_kept_when_given_away(patch: pytest.MonkeyPatch) -> None:
    """A block that was given away is not found in the cache any more."""
    original = BlockPool.allocate

    def allocate(self: BlockPool) -> int:
        known = dict(self._block_of)
        block = original(self)
        self._block_of = known
        return block

    patch.setattr(BlockPool, "allocate", allocate)
    patch.setattr(BlockPool, "check_integrity", lambda self, tables=(): None)


@mutant
def last_token_of_the_prompt_from_the_cache(patch: pytest.MonkeyPatch) -> None:
    """The last token of what is given is always computed, for what it draws."""
    patch.setattr(Sequence, "reusable", property(lambda self: self.given))


@mutant
def cached_ids_not_told(patch: pytest.MonkeyPatch) -> None:
    """Ranks know the ids of what they take from the cache."""
    patch.setattr(draft, "Told", lambda slot, first, ids: Told(slot, first, ()))
