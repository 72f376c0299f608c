"""Mutants of the coordinator's memory of requests, and of its credits: journal, attempts, streams, routing.

Each breaks one line of production code while its patch is in place; its docstring is the promise that this breaks.
"""

from __future__ import annotations

import pytest

from coordinator.answer_text import AnswerText
from coordinator.requests import waiting
from coordinator.requests.core import CoordinatorCore
from coordinator.requests.events import Append, Send
from coordinator.requests.life import Life, Phase
from coordinator.requests.lives import Lives
from coordinator.requests.router import Link, Router
from echelon.internal.link import Progress, TokenRun
from tests.simulation.mutants.registry import mutant, returning


@mutant
def acknowledged_before_journal(patch: pytest.MonkeyPatch) -> None:
    """What a leader told is in the journal before the leader may forget it."""
    returning(patch, Lives, "take_effects", lambda found: sorted(found, key=lambda each: not isinstance(each, Send)))


@mutant
def delivered_ids_not_replayed(patch: pytest.MonkeyPatch) -> None:
    """A replay goes on behind the ids that were delivered, and draws none of them again."""
    returning(patch, Life, "progress", lambda known: tuple(Progress(each.choice) for each in known))


@mutant
def attempts_numbered_again_after_a_lost_record(patch: pytest.MonkeyPatch) -> None:
    """No two attempts have one number, also when a full disk or a power cut took the record of one."""
    patch.setattr(Lives, "next_attempt", lambda self: self._state.last_attempt + 1)


@mutant
def ids_that_the_client_alone_has_ignored(patch: pytest.MonkeyPatch) -> None:
    """Tokens that the disk lost are taken back from the client that holds them."""
    patch.setattr(Lives, "_take_over", lambda self, life, received: None)


@mutant
def deliver_before_journal(patch: pytest.MonkeyPatch) -> None:
    """What a client was shown is in the journal: a coordinator that dies goes on behind it."""
    returning(patch, Lives, "take_effects", lambda found: sorted(found, key=lambda each: isinstance(each, Append)))


@mutant
def any_attempt(patch: pytest.MonkeyPatch) -> None:
    """Tokens of an attempt that was given up never enter the journal."""

    def current(self: CoordinatorCore, request_id: str, attempt: int) -> Life | None:
        life = self._lives.get(request_id)
        return life if life and life.phase is Phase.RUNNING else None

    patch.setattr(CoordinatorCore, "_current", current)


@mutant
def any_first_token(patch: pytest.MonkeyPatch) -> None:
    """A token is journaled once, at its place: never twice, never behind a gap."""
    original = Lives.accept

    def accept(self: Lives, now: float, life: Life, run: TokenRun) -> None:
        original(self, now, life, run._replace(first_token=len(life.entry.answers[run.choice].ids)))

    patch.setattr(Lives, "accept", accept)


@mutant
def no_replay(patch: pytest.MonkeyPatch) -> None:
    """A request whose replica was lost is taken up again."""
    patch.setattr(Lives, "interrupt", lambda self, now, life, reason: None)


@mutant
def nothing_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A request is forgotten once its resume window is over."""
    patch.setattr(Lives, "forget", lambda self, life: None)


@mutant
def attempts_numbered_again_from_one(patch: pytest.MonkeyPatch) -> None:
    """No two attempts have one number, also when all that had more are forgotten."""

    def next_attempt(self: Lives) -> int:
        return 1 + max((life.entry.attempt for life in self._lives.values()), default=0)

    patch.setattr(Lives, "next_attempt", next_attempt)


@mutant
def prompts_logprobs_not_taken(patch: pytest.MonkeyPatch) -> None:
    """Log-probabilities of the prompt that were asked for are answered."""
    patch.setattr(CoordinatorCore, "_take_prompted", lambda self, prompted: None)


@mutant
def priority_ignored_by_the_coordinator(patch: pytest.MonkeyPatch) -> None:
    """Of requests that wait for a replica the one with the lower priority goes first."""
    returning(patch, waiting, "_place", lambda place: (0, *place[1:]))


@mutant
def stop_judged_late(patch: pytest.MonkeyPatch) -> None:
    """A stop string ends the answer with the token that completes it."""
    original = AnswerText._find
    patch.setattr(AnswerText, "_find", lambda self, text, before: original(self, text[:-1], 0))


@mutant
def held_back_text_lost_on_resume(patch: pytest.MonkeyPatch) -> None:
    """Text that waited for the next token comes, also if another stream began meanwhile."""
    original = Life._read_texts

    def read_texts(self: Life, counts: list[int]) -> None:
        original(self, counts)
        for text in self._texts:
            text._held_back = ""

    patch.setattr(Life, "_read_texts", read_texts)


@mutant
def min_tokens_ignored(patch: pytest.MonkeyPatch) -> None:
    """No end token ends an answer before min_tokens."""
    patch.setattr(Life, "_ends", lambda self, token_id, count: token_id in self.stop_ids)


@mutant
def resumed_at_another_choice(patch: pytest.MonkeyPatch) -> None:
    """A client goes on in every choice behind what it holds of that choice."""
    original = Life.attach
    patch.setattr(Life, "attach", lambda self, stream, received: original(self, stream, received[::-1]))


@mutant
def finishes_in_wrong_order(patch: pytest.MonkeyPatch) -> None:
    """Each choice is told its own end."""
    original = Lives._finish

    def finish(self: Lives, now: float, life: Life) -> None:
        life.finishes.reverse()
        original(self, now, life)

    patch.setattr(Lives, "_finish", finish)


@mutant
def no_credit_back(patch: pytest.MonkeyPatch) -> None:
    """A slot that was given back is given out again: no credit is lost."""
    patch.setattr(Link, "release", lambda self, request_id, attempt: None)


@mutant
def ended_epochs_take_requests(patch: pytest.MonkeyPatch) -> None:
    """No request goes to an epoch that is over."""
    patch.setattr(Router, "end", lambda self, replica, epoch: None)


@mutant
def credits_not_asked_for(patch: pytest.MonkeyPatch) -> None:
    """A replica is given no more choices than it has slots."""
    patch.setattr(Link, "fits", lambda self, size: True)


@mutant
def one_s_end_loses_what_others_run(patch: pytest.MonkeyPatch) -> None:
    """The end of one replica interrupts nothing that another runs."""

    def running_on(self: Lives, replica: int) -> list[Life]:
        return [life for life in self._lives.values() if life.phase is Phase.RUNNING]

    patch.setattr(Lives, "running_on", running_on)


@mutant
def only_the_first_replica_is_asked(patch: pytest.MonkeyPatch) -> None:
    """No request waits while a replica could take it."""
    returning(patch, Router, "able", lambda links: [link for link in links if link.fence.replica == 0])
