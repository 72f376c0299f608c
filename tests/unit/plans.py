"""Requests without an engine: every plan that a few of them need, run on a runner of their own, and what each got.

Plans are made ahead of results, as none needs another's; blocks lie scattered, and the cache starts full of NaN.
`as_two_ranks` does the same with two tensor ranks, in two threads over gloo.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from echelon.internal.link import Fence, Logprob, Sampling
from models.config import read_model_config, with_prediction
from models.constraints import constraint_tokenizer
from models.registry import build_model
from parallel.context import ParallelContext, solo_context
from parallel.degrees import Degrees
from tests.ranks import as_ranks
from tests.unit.again import Again
from worker.kv_cache import KVCache
from worker.loader import load_weights
from worker.matchers import Matchers
from worker.plan import Admit, Row, StepPlan, StepResult, decode, encode
from worker.runner import Runner, RunnerLimits

T = TypeVar("T")

FENCE = Fence(term=1, replica=0, epoch=4)
LIMITS = RunnerLimits(max_running=8, max_context=96, block_tokens=4)
BLOCKS = 200
CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=99, seed=0)


@dataclass(frozen=True, slots=True)
class Ask:
    """A request as these plans run it: from step `start`, in `slot`, what is given in chunks of `chunk`.

    replayed: generated ids that are prefilled after the prompt. tokens: how many are generated besides.
    """

    prompt: tuple[int, ...]
    tokens: int = 10
    slot: int = 0
    start: int = 0
    chunk: int = 7
    sampling: Sampling = GREEDY
    replayed: tuple[int, ...] = ()
    logprobs: int | None = None
    scored: int | None = None

    @property
    def given(self) -> tuple[int, ...]:
        return self.prompt + self.replayed

    def admit(self) -> Admit:
        return Admit(self.slot, 0, len(self.prompt), self.sampling)

    def row(self, step: int) -> Row | None:
        """Its row in a step: prompt chunks, then decode rows, whose ids the plan cannot know."""
        chunks = -(-len(self.given) // self.chunk)
        place = step - self.start
        if not 0 <= place < chunks + self.tokens - 1:
            return None
        if place >= chunks:
            return Row(self.slot, len(self.given) + place - chunks, 1, None, True, self.logprobs)
        first, end = place * self.chunk, (place + 1) * self.chunk
        scored, next_id = self.scored, self.prompt[end] if end < len(self.prompt) else None
        given = self.given[first:end]
        return Row(self.slot, first, len(given), given, place == chunks - 1, self.logprobs, scored, next_id)


@dataclass(frozen=True, slots=True)
class Answer:
    ids: tuple[int, ...]
    logprobs: tuple[Logprob | None, ...]
    scores: tuple[Logprob, ...] = ()


def plans_of(asks: list[Ask], seed: int = 0) -> list[StepPlan]:
    """All plans of these requests; none needs a result of another. Blocks lie scattered, as seed draws."""
    free = random.Random(seed).sample(range(BLOCKS), BLOCKS)
    held: dict[int, int] = {}  # tokens that a slot's blocks hold
    plans: list[StepPlan] = []
    while any(step_rows := [ask.row(len(plans)) for ask in asks]) or len(plans) < max(ask.start for ask in asks):
        rows = sorted((row for row in step_rows if row), key=lambda row: row.given is not None)
        begun = [ask for ask in asks if ask.start == len(plans)]
        held |= {ask.slot: 0 for ask in begun}
        blocks = []
        for row in rows:
            while held[row.slot] < row.first + row.tokens:
                blocks.append((row.slot, held[row.slot] // LIMITS.block_tokens, free.pop()))
                held[row.slot] += LIMITS.block_tokens
        admits = tuple(ask.admit() for ask in begun)
        plans.append(StepPlan(FENCE, len(plans) + 1, admits, tuple(blocks), tuple(rows)))
    return plans


def answers_of(asks: list[Ask], plans: list[StepPlan], results: list[StepResult]) -> list[Answer]:
    """What each request got; a slot belongs to the latest request that began in it."""
    found: dict[Ask, list[tuple[int, Logprob | None]]] = {ask: [] for ask in asks}
    scores: dict[Ask, tuple[Logprob, ...]] = dict.fromkeys(asks, ())
    for place, (plan, result) in enumerate(zip(plans, results, strict=True)):
        assert result.step == plan.step and not result.faults
        owners = {ask.slot: ask for ask in sorted(asks, key=lambda ask: ask.start) if ask.start <= place}
        sampled = [owners[row.slot] for row in plan.rows if row.sampled]
        for ask, token, logprob in zip(sampled, result.ids, result.logprobs, strict=True):
            found[ask].append((token, logprob))
        scored = [owners[row.slot] for row in plan.rows if row.scored is not None]
        for ask, part in zip(scored, result.scores, strict=True):
            scores[ask] += part
    return [
        Answer(tuple(token for token, _ in found[ask]), tuple(logprob for _, logprob in found[ask]), scores[ask])
        for ask in asks
    ]


def new_runner(
    directory: Path,
    context: ParallelContext,
    limits: RunnerLimits = LIMITS,
    blocks: int = BLOCKS,
    graphs: Sequence[int] = (),
    predicts: bool = False,
    padded: bool = False,
    keep_float8: bool = False,
) -> Runner:
    """graphs: numbers of rows that are captured, as far as there is no device. padded: others may be later."""
    config = read_model_config(directory, keep_float8=keep_float8)
    if predicts:
        config = with_prediction(config)
    model = build_model(config, context)
    load_weights(model, config, directory, context, lambda loaded_bytes, total_bytes: None)
    cache = KVCache(config, context, blocks, limits.block_tokens, padded=padded or bool(graphs))
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(torch.nan)  # whatever is read without having been written shows
    matchers = Matchers(lambda: constraint_tokenizer(directory, config.vocab_size, config.end_ids), threads=1)
    runner = Runner(model, cache, context, limits, matchers)
    if graphs:
        runner.capture_graphs(Again, graphs)
    return runner


def answer(directory: Path, asks: list[Ask], seed: int = 0) -> list[Answer]:
    """Run these requests together on a runner of their own."""
    runner = new_runner(directory, solo_context(CPU, torch.float64, FENCE.epoch))
    plans = plans_of(asks, seed)
    return answers_of(asks, plans, [runner.run(decode(encode(plan))) for plan in plans])


def as_two_ranks(work: Callable[[ParallelContext], T]) -> list[T]:
    """What a function returns as either rank of tensor 2."""
    return as_ranks(Degrees(tensor=2), work, epoch=FENCE.epoch)
