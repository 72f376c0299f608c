"""Scheduler and runner together on a tiny model in float64: whatever the scheduler does, every choice gets its own ids.

The ids and log-probabilities that each choice gets alone, in one chunk, are those that it gets in company, in too small
a pool, with preemptions, hits, shared prompts and replays, whatever its sampling looks back at.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from echelon.internal.link import Assign, Logprob, Progress
from models.constraints import compile_constraint
from parallel.context import solo_context
from tests.tiny import make_checkpoint
from tests.unit.paged_device import request
from tests.unit.plans import CPU, FENCE, new_runner
from worker.limits import EngineLimits
from worker.plan import StepPlan, decode, encode
from worker.runner import Runner, RunnerLimits
from worker.scheduler import Scheduler
from worker.sequence import Outcome
from worker.speculation import Drafter

BLOCK_TOKENS = 4
MAX_CONTEXT = 64
MAX_TOKENS = 14

Choice = tuple[str, int]


@dataclass
class Answers:
    """By request and choice; prompts by request."""

    ids: dict[Choice, list[int]] = field(default_factory=dict)
    logprobs: dict[Choice, list[Logprob]] = field(default_factory=dict)
    prompts: dict[str, tuple[Logprob, ...]] = field(default_factory=dict)

    def take(self, outcome: Outcome) -> None:
        for run in outcome.runs:
            ids = self.ids.setdefault((run.request, run.choice), [])
            assert run.first_token == len(ids)
            ids += run.ids
            self.logprobs.setdefault((run.request, run.choice), []).extend(run.logprobs)
        self.prompts |= {told.request: told.prompt_logprobs for told in outcome.prompted}


class Replica:
    """A scheduler whose plans, two ahead, run on a model of its own."""

    def __init__(
        self,
        checkpoint: Path,
        *,
        max_running: int = 4,
        kv_blocks: int = 24,
        max_step_tokens: int = 9,
        speculation_tokens: int = 0,
        new_drafter: Callable[[], Drafter] | None = None,
        predicts: bool = False,
    ) -> None:
        limits = RunnerLimits(max_running, MAX_CONTEXT, BLOCK_TOKENS)
        context = solo_context(CPU, torch.float64, FENCE.epoch)
        self.runner: Runner = new_runner(checkpoint, context, limits, kv_blocks, predicts=predicts)
        sizes = EngineLimits(max_running, kv_blocks, BLOCK_TOKENS, max_step_tokens, MAX_CONTEXT)
        self.scheduler = Scheduler(
            replace(sizes, speculation_tokens=speculation_tokens, predicts=predicts), new_drafter
        )
        self.answers = Answers()

    def answer(self, assigns: Iterable[Assign]) -> Answers:
        for assign in assigns:
            for progress in assign.choices:
                self.answers.ids[assign.request, progress.choice] = list(progress.generated)
            self.answers.take(self.scheduler.add(assign))
        plans: list[StepPlan] = []
        while not self.scheduler.idle or plans:
            while len(plans) < 2 and (plan := self.scheduler.schedule(FENCE)):
                plans.append(plan)
            result = self.runner.run(decode(encode(plans.pop(0))))
            assert not result.faults
            self.answers.take(self.scheduler.commit(result))
        self.scheduler.check_integrity()
        assert self.scheduler.blocks_referenced == 0
        return self.answers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def assigns() -> list[Assign]:
    """Every rule that looks back at what was generated, every kind of extra row; prompts begin alike."""
    draw = random.Random(3)
    common = [draw.randrange(2, 300) for _ in range(14)]
    settings: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": 3},
        {"presence_penalty": 1.5, "frequency_penalty": 0.7, "repetition_penalty": 0.4, "logprobs": 0},
        {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "prompt_logprobs": 2},
        {"min_p": 0.01, "bad_words": ((17,), (30, 31)), "logit_bias": ((30, 4.0), (31, 4.0))},
        {"stop_token_ids": tuple(range(2, 60)), "min_tokens": 5, "temperature": 1.5},
        {"grammar": compile_constraint("regex", "[a-z ]{6,}[0-9]"), "stop_token_ids": (1,)},
        {"temperature": 0.0, "prompt_logprobs": 0, "repetition_penalty": 1.2},
    ]
    return [
        request(
            f"r{number}",
            common[: 2 * number] + [draw.randrange(2, 300) for _ in range(20 - 2 * number)],
            MAX_TOKENS,
            choices=[Progress(choice) for choice in range(1 + number % 3)],
            priority=-number % 2,
            **setting,
        )
        for number, setting in enumerate(settings)
    ]


@pytest.fixture(scope="module")
def alone(checkpoint: Path, assigns: list[Assign]) -> Answers:
    """Each choice by itself, its prompt in one chunk."""
    answers = Answers()
    for assign in assigns:
        for progress in assign.choices:
            replica = Replica(checkpoint, kv_blocks=16, max_step_tokens=MAX_CONTEXT)
            found = replica.answer([replace(assign, choices=(progress,))])
            assert not replica.scheduler.counters["cache_hits"] and not replica.scheduler.counters["preemptions"]
            answers.ids |= found.ids
            answers.logprobs |= found.logprobs
            answers.prompts |= found.prompts
    return answers


def check_same(found: Answers, expected: Answers, name: str = "", within: float = 1e-9) -> None:
    """name stands before the names of the expected requests."""
    for (asked, choice), ids in expected.ids.items():
        assert found.ids[name + asked, choice] == ids, (asked, choice)
        check_logprobs(found.logprobs[name + asked, choice], expected.logprobs[asked, choice], within)
    for asked, prompt in expected.prompts.items():
        check_logprobs(found.prompts[name + asked], prompt, within)


def check_logprobs(found: Iterable[Logprob], expected: Iterable[Logprob], within: float = 1e-9) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.top_ids == other.top_ids
        assert (one.logprob, *one.top_logprobs) == pytest.approx((other.logprob, *other.top_logprobs), abs=within)


def renamed(assigns: Iterable[Assign], name: str, salt: str = "") -> list[Assign]:
    return [replace(assign, request=name + assign.request, cache_salt=salt) for assign in assigns]


def test_company_preemption_hits_and_shared_prompts_change_nothing(
    checkpoint: Path, assigns: list[Assign], alone: Answers
) -> None:
    assert len({tuple(ids) for ids in alone.ids.values()}) == len(alone.ids), "choices and requests differ"
    replica = Replica(checkpoint)
    check_same(replica.answer(assigns), alone)
    check_same(replica.answer(renamed(reversed(assigns), "again-")), alone, "again-")
    counters = replica.scheduler.counters
    happened = {name for name, count in counters.items() if count}
    expected = "preemptions recomputed_tokens cache_hits cached_tokens shared_prefix_tokens chunked_prompts decode_rows"
    assert happened >= set(expected.split()), counters


def test_replays_go_on_as_if_nothing_had_happened(checkpoint: Path, assigns: list[Assign], alone: Answers) -> None:
    replica = Replica(checkpoint)
    interrupted = [
        replace(
            assign,
            attempt=2,
            choices=tuple(
                Progress(progress.choice, tuple(alone.ids[assign.request, progress.choice][: 1 + 2 * progress.choice]))
                for progress in assign.choices
            ),
        )
        for assign in assigns
    ]
    found = replica.answer(interrupted)
    assert found.ids == alone.ids
    for assign in assigns:
        check_logprobs(found.prompts[assign.request], alone.prompts[assign.request])


def test_what_is_found_in_the_cache_is_what_is_read(checkpoint: Path, assigns: list[Assign], alone: Answers) -> None:
    """With the cache corrupted, what is found there gives other ids, and another tenant's requests keep theirs."""
    replica = Replica(checkpoint, kv_blocks=200)
    first = assigns[:2]
    replica.answer(first)
    with torch.inference_mode():
        for tensor in (*replica.runner._kv_cache.keys, *replica.runner._kv_cache.values):
            tensor.neg_()
    replica.answer(renamed(first, "tenant-", salt="tenant"))
    assert replica.scheduler.counters["cached_tokens"] == replica.scheduler.counters["shared_prefix_tokens"]
    found = replica.answer(renamed(first, "again-"))
    for (asked, choice), ids in found.ids.items():
        if asked.startswith("tenant-"):
            assert ids == alone.ids[asked.removeprefix("tenant-"), choice]
        if asked.startswith("again-"):
            assert ids != alone.ids[asked.removeprefix("again-"), choice]
