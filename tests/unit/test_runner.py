"""The runner on tiny models in float64: transformers' tokens, the same in any company, slot, chunking and replay."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from echelon.internal.link import Fence, Logprob, Sampling
from models.config import read_model_config
from models.constraints import constraint_tokenizer
from models.registry import build_model
from parallel.context import ParallelContext, solo_context
from parallel.mesh import close, form_context, open_store
from tests.tiny import make_checkpoint
from worker.kv_cache import KVCache
from worker.loader import load_weights
from worker.matchers import Matchers
from worker.plan import Admit, Row, StepPlan, StepResult, decode, encode
from worker.runner import Runner, RunnerLimits

FENCE = Fence(term=1, replica=0, epoch=4)
LIMITS = RunnerLimits(max_running=8, max_context=96, block_tokens=4)
BLOCKS = 200
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Ask:
    """A request as the plans of this module run it: from step `start`, in `slot`, prompts in chunks of `chunk`."""

    prompt: tuple[int, ...]
    tokens: int = 10
    slot: int = 0
    start: int = 0
    chunk: int = 7
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    logprobs: int | None = None

    def admit(self) -> Admit:
        sampling = Sampling(self.temperature, self.top_p, self.top_k, self.tokens, self.seed)
        return Admit(self.slot, 0, len(self.prompt), sampling)

    def row(self, step: int) -> Row | None:
        """Its row in a step: prompt chunks, then decode rows, whose ids the plan cannot know."""
        chunks = -(-len(self.prompt) // self.chunk)
        place = step - self.start
        if not 0 <= place < chunks + self.tokens - 1:
            return None
        if place >= chunks:
            return Row(self.slot, len(self.prompt) + place - chunks, 1, None, True, self.logprobs)
        given = self.prompt[place * self.chunk :][: self.chunk]
        return Row(self.slot, place * self.chunk, len(given), given, place == chunks - 1, self.logprobs)


@dataclass(frozen=True, slots=True)
class Answer:
    ids: tuple[int, ...]
    logprobs: tuple[Logprob | None, ...]


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
    for place, (plan, result) in enumerate(zip(plans, results, strict=True)):
        assert result.step == plan.step
        owners = {ask.slot: ask for ask in sorted(asks, key=lambda ask: ask.start) if ask.start <= place}
        sampled = [owners[row.slot] for row in plan.rows if row.sampled]
        for ask, token, logprob in zip(sampled, result.ids, result.logprobs, strict=True):
            found[ask].append((token, logprob))
    return [
        Answer(tuple(token for token, _ in found[ask]), tuple(logprob for _, logprob in found[ask])) for ask in asks
    ]


def new_runner(directory: Path, context: ParallelContext) -> Runner:
    config = read_model_config(directory)
    model = build_model(config, context)
    load_weights(model, config, directory, context, lambda loaded_bytes, total_bytes: None)
    cache = KVCache(config, context, BLOCKS, LIMITS.block_tokens)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(torch.nan)  # whatever is read without having been written shows
    matchers = Matchers(lambda: constraint_tokenizer(directory, config.vocab_size, config.end_ids), threads=1)
    return Runner(model, cache, context, LIMITS, matchers)


def answer(directory: Path, asks: list[Ask], seed: int = 0) -> list[Answer]:
    """Run these requests together on a runner of their own."""
    runner = new_runner(directory, solo_context(CPU, torch.float64, FENCE.epoch))
    plans = plans_of(asks, seed)
    return answers_of(asks, plans, [runner.run(decode(encode(plan))) for plan in plans])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    draw = random.Random(5)
    return [tuple(draw.randrange(2, 300) for _ in range(length)) for length in (23, 7, 1, 14, 40)]


def transformers_greedy(directory: Path, prompt: tuple[int, ...], tokens: int) -> tuple[tuple[int, ...], torch.Tensor]:
    """Generated ids, and the log-probabilities before each, [tokens, vocabulary]."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(directory, dtype=torch.float64, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
        logprobs = model(generated).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    return tuple(generated[0, len(prompt) :].tolist()), logprobs


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy_in_company_equals_transformers(family: str, tmp_path: Path, prompts: list[tuple[int, ...]]) -> None:
    directory = make_checkpoint(tmp_path / family, family)
    wanted = (5, None, 0, 1, 20)
    asks = [Ask(prompt, 16, slot=7 - i, start=3 * i, logprobs=wanted[i]) for i, prompt in enumerate(prompts)]
    for ask, found in zip(asks, answer(directory, asks), strict=True):
        ids, logprobs = transformers_greedy(directory, ask.prompt, ask.tokens)
        assert found.ids == ids
        for given, token, expected in zip(found.logprobs, ids, logprobs, strict=True):
            if ask.logprobs is None:
                assert given is None
                continue
            assert given is not None
            assert given.logprob == pytest.approx(expected[token].item(), abs=1e-6)
            top = expected.topk(ask.logprobs)
            assert given.top_ids == tuple(top.indices.tolist())
            assert given.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-6)


def sampled_asks(prompts: list[tuple[int, ...]]) -> list[Ask]:
    """Greedy, plain and truncated sampling, in every order of slots."""
    settings: list[dict[str, float]] = [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9},
        {},
        {"temperature": 1.2, "top_k": 20},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.95},
    ]
    return [
        Ask(prompt, 12, slot=slot, seed=slot - 2, **setting)  # type: ignore[arg-type]
        for slot, (prompt, setting) in enumerate(zip(prompts, settings, strict=True))
    ]


def test_sampled_tokens_are_the_same_in_any_company_slot_and_chunking(
    checkpoint: Path, prompts: list[tuple[int, ...]]
) -> None:
    asks = sampled_asks(prompts)
    together = answer(checkpoint, asks)
    alone = [answer(checkpoint, [ask])[0] for ask in asks]
    assert alone == together
    moved = [replace(ask, slot=7 - ask.slot, start=2 * ask.slot, chunk=64) for ask in asks]
    assert answer(checkpoint, moved, seed=1) == together
    other_seeds = answer(checkpoint, [replace(ask, seed=99) for ask in asks])
    assert [a.ids == b.ids for a, b in zip(other_seeds, together, strict=True)] == [False, False, True, False, False]


def test_asking_for_logprobs_changes_no_token(checkpoint: Path, prompts: list[tuple[int, ...]]) -> None:
    asks = sampled_asks(prompts)
    plain, asked = answer(checkpoint, asks), answer(checkpoint, [replace(ask, logprobs=3) for ask in asks])
    assert [found.ids for found in plain] == [found.ids for found in asked]


def test_replaying_delivered_tokens_goes_on_as_if_nothing_had_happened(
    checkpoint: Path, prompts: list[tuple[int, ...]]
) -> None:
    for ask in sampled_asks(prompts):
        whole = answer(checkpoint, [ask])[0].ids
        for delivered in (1, 5, 11):
            replayed = replace(ask, prompt=ask.prompt + whole[:delivered], tokens=ask.tokens - delivered, slot=6)
            assert answer(checkpoint, [replayed])[0].ids == whole[delivered:]


def test_a_slot_taken_again_keeps_nothing_of_its_last_owner(checkpoint: Path, prompts: list[tuple[int, ...]]) -> None:
    first, second = Ask(prompts[4], 5, temperature=1.0, seed=3), Ask(prompts[1], 9, start=30, temperature=0.5, top_k=9)
    assert answer(checkpoint, [first, second])[1] == answer(checkpoint, [replace(second, start=0)])[0]


def test_steps_may_be_launched_ahead_of_their_results(checkpoint: Path, prompts: list[tuple[int, ...]]) -> None:
    asks = sampled_asks(prompts)
    runner = new_runner(checkpoint, solo_context(CPU, torch.float64, FENCE.epoch))
    plans = plans_of(asks)
    pending = [runner.launch(decode(encode(plan))) for plan in plans]
    assert answers_of(asks, plans, [step.result() for step in pending]) == answer(checkpoint, asks)


@pytest.fixture
def each_rank() -> Iterator[Callable[[Callable[[ParallelContext], list[StepResult]]], list[list[StepResult]]]]:
    """Runs a function as both ranks of tensor 2, in two threads over gloo."""
    store, address = open_store("127.0.0.1")

    def run(work: Callable[[ParallelContext], list[StepResult]]) -> list[list[StepResult]]:
        def as_rank(rank: int) -> list[StepResult]:
            context = form_context(address, "test", FENCE.epoch, rank, 2, CPU, torch.float64, timeout_s=60)
            try:
                return work(context)
            finally:
                context.tensor.barrier()
                close(context)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(as_rank, range(2)))

    yield run
    del store


def test_two_tensor_ranks_agree_and_sample_what_one_samples(
    checkpoint: Path,
    prompts: list[tuple[int, ...]],
    each_rank: Callable[[Callable[[ParallelContext], list[StepResult]]], list[list[StepResult]]],
) -> None:
    asks = [replace(ask, start=ask.slot, logprobs=(2, None, 0)[ask.slot % 3]) for ask in sampled_asks(prompts)]
    plans = plans_of(asks)

    def work(context: ParallelContext) -> list[StepResult]:
        runner = new_runner(checkpoint, context)
        return [runner.run(decode(encode(plan))) for plan in plans]

    first, second = each_rank(work)
    assert first == second
    for two, one in zip(answers_of(asks, plans, first), answer(checkpoint, asks), strict=True):
        assert two.ids == one.ids
        for found, expected in zip(two.logprobs, one.logprobs, strict=True):
            if expected is None or found is None:
                assert found is expected
                continue
            assert found.top_ids == expected.top_ids
            assert found.logprob == pytest.approx(expected.logprob, abs=1e-6)


class ForbidReadingBack(TorchDispatchMode):
    """Raises where an operation has the host wait for the device: a value read, or a shape that depends on one."""

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: object, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        names = (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "unique",
            "equal",
            "is_nonzero",
            "repeat_interleave",
        )
        assert not any(name in func.name() for name in names), f"{func.name()} waits for the device"
        return func(*args, **(kwargs or {}))


def test_launching_never_waits_for_the_device(checkpoint: Path, prompts: list[tuple[int, ...]]) -> None:
    asks = [replace(ask, logprobs=(None, 3)[ask.slot % 2], start=ask.slot) for ask in sampled_asks(prompts)]
    runner = new_runner(checkpoint, solo_context(CPU, torch.float64, FENCE.epoch))
    plans = [decode(encode(plan)) for plan in plans_of(asks)]
    with ForbidReadingBack():  # type: ignore[no-untyped-call]
        for plan in plans:
            runner.launch(plan)
        with pytest.raises(AssertionError, match="waits for the device"):
            torch.ones(1).item()


def test_a_step_that_samples_nothing_has_an_empty_result(checkpoint: Path) -> None:
    runner = new_runner(checkpoint, solo_context(CPU, torch.float64, FENCE.epoch))
    assert runner.run(decode(encode(StepPlan(FENCE, 1)))) == StepResult(1, (), ())
    row = Row(0, 0, 2, (5, 6), False)
    assert runner.run(decode(encode(StepPlan(FENCE, 2, blocks=((0, 0, 9),), rows=(row,))))) == StepResult(2, (), ())


def test_a_plan_of_another_epoch_is_not_run(checkpoint: Path) -> None:
    runner = new_runner(checkpoint, solo_context(CPU, torch.float64, FENCE.epoch))
    with pytest.raises(AssertionError, match="another epoch"):
        runner.run(decode(encode(StepPlan(Fence(1, 0, 5), 1))))
