"""Speculation on a tiny model in float64: with any drafts every choice gets the ids and scores that it gets without."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from echelon.internal.link import Assign, Logprob, Progress, Sampling
from parallel.context import solo_context
from parallel.degrees import Degrees
from tests.unit.paged_device import request
from tests.unit.pipelines import Pipeline
from tests.unit.plans import CPU, FENCE, new_runner
from tests.unit.test_engine_on_model import (
    BLOCK_TOKENS,
    MAX_CONTEXT,
    Answers,
    Replica,
    assigns,
    check_same,
    checkpoint,
)
from worker.limits import EngineLimits
from worker.plan import Admit, Row, StepPlan, StepResult, Told, decode, encode
from worker.runner import RunnerLimits
from worker.speculation import Drafter, rejected

__all__ = ["assigns", "checkpoint"]  # fixtures

DRAFTS = 4


@dataclass(frozen=True, slots=True)
class Oracle:
    """Knows every answer, and is wrong at every position that `wrong` divides."""

    answers: Sequence[tuple[int, ...]]  # behind their prompts
    wrong: int

    def __call__(self, ids: Sequence[int], most: int) -> tuple[int, ...]:
        known = tuple(ids)
        for answer in self.answers:
            if answer[: len(known)] == known:
                coming = list(enumerate(answer))[len(known) : len(known) + most]
                return tuple(token + (position % self.wrong == 0) for position, token in coming)
        return ()


def turns(name: str, max_tokens: int, temperature: float) -> Assign:
    """Two ids that are likelier than all others and never stand twice in a row take turns."""
    likely, never = ((9, 40.0), (10, 40.0)), ((9, 9), (10, 10))
    sampling: dict[str, Any] = {"temperature": temperature, "logit_bias": likely, "bad_words": never, "logprobs": 2}
    return request(name, [5, 6, 7, len(name) + 20], max_tokens, **sampling)


@pytest.fixture(scope="module")
def plain(checkpoint: Path, assigns: list[Assign]) -> Answers:
    """Without speculation, and with room for all."""
    return Replica(checkpoint, kv_blocks=200, max_step_tokens=MAX_CONTEXT).answer(assigns)


def oracle(assigns: Sequence[Assign], answers: Answers, wrong: int) -> Callable[[], Drafter]:
    prompts = {assign.request: assign.prompt for assign in assigns}
    whole = [(*prompts[name], *ids) for (name, _), ids in answers.ids.items()]
    return lambda: Oracle(whole, wrong)


@pytest.mark.parametrize(("wrong", "kv_blocks"), [(1, 24), (3, 24), (5, 200)], ids=str)
def test_any_drafts_leave_every_answer_as_it_is(
    wrong: int, kv_blocks: int, checkpoint: Path, assigns: list[Assign], plain: Answers
) -> None:
    """Greedy and sampled, with every rule and kind of row, alone and in company."""
    drafter = oracle(assigns, plain, wrong)
    sizes: dict[str, Any] = {"max_running": 20, "kv_blocks": kv_blocks, "max_step_tokens": 40}
    replica = Replica(checkpoint, **sizes, speculation_tokens=DRAFTS, new_drafter=drafter)
    check_same(replica.answer(assigns), plain)
    counters = replica.scheduler.counters
    assert counters["drafted_tokens"] > 0 and (counters["preemptions"] > 0) == (kv_blocks == 24)
    if wrong == 1:
        assert counters["accepted_tokens"] == 0
    else:
        assert counters["accepted_tokens"] > counters["drafted_tokens"] / 5


def test_text_that_repeats_takes_fewer_steps_than_it_has_tokens(checkpoint: Path) -> None:
    for temperature in (0.0, 0.8):
        assign = turns("turns", 40, temperature)
        expected = Replica(checkpoint).answer([assign])
        replica = Replica(checkpoint, speculation_tokens=DRAFTS)
        check_same(replica.answer([assign]), expected)
        counters = replica.scheduler.counters
        assert counters["decode_rows"] + counters["accepted_tokens"] == 39
        assert counters["steps"] <= 20


@pytest.mark.parametrize(
    ("degrees", "depth"),
    [
        (Degrees(tensor=2), 1),
        (Degrees(pipeline=2), 2),
        pytest.param(Degrees(pipeline=2, data=2), 2, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_several_ranks_agree_on_what_came_true(checkpoint: Path, degrees: Degrees, depth: int) -> None:
    """Drafts stand on every rank before their rows; each tensor rank samples some of these rows."""
    asked = [turns("t" * number, 12 + 2 * number, 0.4 * number) for number in range(1, 4)]
    expected = Replica(checkpoint).answer(asked)
    stages: dict[str, Any] = {"stages": degrees.pipeline, "depth": depth, "data": degrees.data}
    limits = EngineLimits(12, 60, BLOCK_TOKENS, 24, MAX_CONTEXT, speculation_tokens=3, **stages)
    with Pipeline(checkpoint, degrees, limits) as pipeline:
        found = Answers()
        found.take(pipeline.answer(asked))
    check_same(found, expected)
    assert pipeline.core.stats().counters["accepted_tokens"] > 5


def test_a_replay_and_what_is_cached_go_on_as_without(checkpoint: Path, assigns: list[Assign], plain: Answers) -> None:
    drafter = oracle(assigns, plain, wrong=5)
    replica = Replica(checkpoint, max_running=20, kv_blocks=90, speculation_tokens=DRAFTS, new_drafter=drafter)
    interrupted = [
        replace(
            assign,
            attempt=2,
            choices=tuple(
                Progress(progress.choice, tuple(plain.ids[assign.request, progress.choice][: 2 + 2 * progress.choice]))
                for progress in assign.choices
            ),
        )
        for assign in assigns
    ]
    assert replica.answer(interrupted).ids == plain.ids
    again = [replace(assign, request="again-" + assign.request) for assign in assigns]
    check_same(replica.answer(again), plain, "again-")
    counters = replica.scheduler.counters
    assert counters["accepted_tokens"] > 0 and counters["cached_tokens"] > counters["shared_prefix_tokens"]


@pytest.mark.long
def test_ids_before_and_behind_a_draft_that_came_true_are_distributed_as_the_model_says(checkpoint: Path) -> None:
    """Over 20,000 seeds; of the rows behind the draft, those whose draft was drawn. Chi-square with 7 degrees."""
    slots, steps, begin, kinds = 128, 160, 5, 8
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=kinds, max_tokens=4, seed=0)
    limits = RunnerLimits(slots, 4, 4)
    runner = new_runner(checkpoint, solo_context(CPU, torch.float64, FENCE.epoch), limits, slots)

    def run(step: int, draft: int, logprobs: int | None = None) -> StepResult:
        seeds = range(step * slots, (step + 1) * slots)
        admits = tuple(Admit(slot, 0, 1, replace(sampling, seed=seed)) for slot, seed in enumerate(seeds))
        blocks = tuple((slot, 0, slot) for slot in range(slots))
        told = tuple(Told(slot, 0, (begin, draft)) for slot in range(slots))
        rows = tuple(Row(slot, first, 1, None, True, logprobs) for slot in range(slots) for first in (0, 1))
        return runner.run(decode(encode(StepPlan(FENCE, step, admits, blocks, rows, told))))

    def shares(logprob: Logprob | None) -> dict[int, float]:
        assert logprob is not None
        likeliest = dict(zip(logprob.top_ids, map(math.exp, logprob.top_logprobs), strict=True))
        return {token: share / sum(likeliest.values()) for token, share in likeliest.items()}

    draft = next(iter(shares(run(1, begin, kinds).logprobs[0])))
    before, behind = map(shares, run(1, draft, kinds).logprobs[:2])
    first: Counter[int] = Counter()
    second: Counter[int] = Counter()
    for step in range(1, steps + 1):
        ids = run(step, draft).ids
        first.update(ids[::2])
        second.update(ids[row] for row in range(1, len(ids), 2) if row not in rejected({row: draft}, ids))
    assert first.total() == slots * steps > 20_000 and second.total() == first[draft] > 2_000
    for drawn, expected in ((first, before), (second, behind)):
        assert drawn.keys() <= expected.keys()
        expects = {token: share * drawn.total() for token, share in expected.items()}
        square = sum((drawn[token] - count) ** 2 / count for token, count in expects.items())
        assert square < 24.3, "the 0.999 quantile"
