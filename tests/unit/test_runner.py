"""The runner on tiny models in float64: transformers' tokens, the same in any company, slot, chunking and replay."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from echelon.internal.link import Fence, Sampling
from models.constraints import compile_constraint
from parallel.context import ParallelContext, solo_context
from tests.reading_back import ForbidReadingBack
from tests.tiny import make_checkpoint
from tests.unit.plans import CPU, FENCE, GREEDY, Answer, Ask, answer, answers_of, as_two_ranks, new_runner, plans_of
from worker.plan import Row, StepPlan, StepResult, Told, decode, encode

Asks = Callable[[list[tuple[int, ...]]], list[Ask]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    draw = random.Random(5)
    return [tuple(draw.randrange(2, 300) for _ in range(length)) for length in (23, 7, 1, 14, 40)]


def transformers_greedy(
    directory: Path, prompt: tuple[int, ...], tokens: int, **options: float
) -> tuple[tuple[int, ...], torch.Tensor]:
    """Generated ids, and the log-probabilities before each token but the first, [prompt + tokens - 1, vocabulary]."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(directory, dtype=torch.float64, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0, **options
        )
        logprobs = model(generated).logits[0].log_softmax(-1)[:-1]
    return tuple(generated[0, len(prompt) :].tolist()), logprobs


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy_in_company_equals_transformers(family: str, tmp_path: Path, prompts: list[tuple[int, ...]]) -> None:
    directory = make_checkpoint(tmp_path / family, family)
    wanted = (5, None, 0, 1, 20)
    asks = [Ask(prompt, 16, slot=7 - i, start=3 * i, logprobs=wanted[i]) for i, prompt in enumerate(prompts)]
    for ask, found in zip(asks, answer(directory, asks), strict=True):
        ids, logprobs = transformers_greedy(directory, ask.prompt, ask.tokens)
        assert found.ids == ids
        for given, token, expected in zip(found.logprobs, ids, logprobs[len(ask.prompt) - 1 :], strict=True):
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
    settings = [(1.0, 1.0, 0), (0.8, 0.9, 0), (0.0, 1.0, 0), (1.2, 1.0, 20), (0.7, 0.95, 40)]
    return [
        Ask(prompt, 12, slot=slot, sampling=Sampling(*setting, max_tokens=12, seed=slot - 2))
        for slot, (prompt, setting) in enumerate(zip(prompts, settings, strict=True))
    ]


def ruled_asks(prompts: list[tuple[int, ...]]) -> list[Ask]:
    """Every rule, in company of rows without any."""
    digits = compile_constraint("regex", "[0-9 ]{4,60}")
    settings: list[dict[str, Any]] = [
        {"temperature": 1.0, "presence_penalty": 0.8, "frequency_penalty": 0.5, "min_p": 0.01},
        {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.6, "bad_words": tuple((i,) for i in range(2, 200))},
        {"temperature": 0.0, "repetition_penalty": 0.3, "bad_words": ((5, 6), (7, 8, 9))},
        {
            "temperature": 1.2,
            "min_tokens": 6,
            "stop_token_ids": tuple(range(100)),
            "logit_bias": ((7, 8.0), (300, 6.0)),
        },
        {"temperature": 1.0, "top_k": 12, "grammar": digits, "min_tokens": 11, "stop_token_ids": (1,)},
    ]
    defaults = {"top_p": 1.0, "top_k": 0, "max_tokens": 12}
    asks = [
        Ask(prompt, 12, slot=slot, sampling=Sampling(**(defaults | setting), seed=slot - 2))
        for slot, (prompt, setting) in enumerate(zip(prompts, settings, strict=True))
    ]
    return [*asks, Ask(prompts[0], 12, slot=5, sampling=Sampling(1.0, 1.0, 0, 12, seed=3))]


each_kind = pytest.mark.parametrize("asks_of", [sampled_asks, ruled_asks])


@each_kind
def test_sampled_tokens_are_the_same_in_any_company_slot_and_chunking(
    asks_of: Asks, checkpoint: Path, prompts: list[tuple[int, ...]]
) -> None:
    asks = asks_of(prompts)
    together = answer(checkpoint, asks)
    alone = [answer(checkpoint, [ask])[0] for ask in asks]
    assert alone == together
    moved = [replace(ask, slot=7 - ask.slot, start=2 * ask.slot, chunk=64) for ask in asks]
    assert answer(checkpoint, moved, seed=1) == together
    other_seeds = answer(checkpoint, [replace(ask, sampling=replace(ask.sampling, seed=99)) for ask in asks])
    for ask, found, other in zip(asks, together, other_seeds, strict=True):
        assert (found.ids == other.ids) == (ask.sampling.temperature == 0)


def test_rules_change_what_the_runner_says(checkpoint: Path, prompts: list[tuple[int, ...]]) -> None:
    """Each of the settings above does something here, so the tests that use them can tell."""
    asks = ruled_asks(prompts)
    free = [
        replace(ask, sampling=Sampling(ask.sampling.temperature, ask.sampling.top_p, ask.sampling.top_k, 12, seed))
        for ask, seed in zip(asks, (-2, -1, 0, 1, 2, 3), strict=True)
    ]
    pairs = zip(answer(checkpoint, asks), answer(checkpoint, free), strict=True)
    assert [ruled.ids == plain.ids for ruled, plain in pairs] == [False] * 5 + [True]


@each_kind
def test_asking_for_logprobs_changes_no_token(asks_of: Asks, checkpoint: Path, prompts: list[tuple[int, ...]]) -> None:
    asks = asks_of(prompts)
    plain, asked = answer(checkpoint, asks), answer(checkpoint, [replace(ask, logprobs=3, scored=2) for ask in asks])
    assert [found.ids for found in plain] == [found.ids for found in asked]


@each_kind
def test_replaying_delivered_tokens_goes_on_as_if_nothing_had_happened(
    asks_of: Asks, checkpoint: Path, prompts: list[tuple[int, ...]]
) -> None:
    for ask in asks_of(prompts):
        whole = answer(checkpoint, [ask])[0].ids
        for delivered in (1, 5, 11):
            replayed = replace(ask, replayed=whole[:delivered], tokens=ask.tokens - delivered, slot=6)
            assert answer(checkpoint, [replayed])[0].ids == whole[delivered:]


@each_kind
def test_a_slot_taken_again_keeps_nothing_of_its_last_owner(
    asks_of: Asks, checkpoint: Path, prompts: list[tuple[int, ...]]
) -> None:
    for first in asks_of(prompts):
        second = Ask(prompts[1], 9, slot=first.slot, start=30, sampling=Sampling(0.5, 1.0, 9, 9, seed=0))
        assert answer(checkpoint, [first, second])[1] == answer(checkpoint, [replace(second, start=0)])[0]


def test_a_told_prefix_counts_like_one_that_was_computed(checkpoint: Path, prompts: list[tuple[int, ...]]) -> None:
    """A second request takes over the blocks of a first that began alike; its rules look back on what it is told."""
    for ask in ruled_asks(prompts):
        ask = replace(ask, prompt=prompts[0], slot=0)
        whole, told = answer(checkpoint, [ask])[0].ids, 20
        runner = new_runner(checkpoint, solo_context(CPU, torch.float64, FENCE.epoch))
        ids = ask.prompt + whole[:4]  # 27 tokens, of which 20 are cached; the answer begins at 23
        blocks = tuple((0, index, 9 - index) for index in range(10))
        first = StepPlan(FENCE, 1, (ask.admit(),), blocks, (Row(0, 0, len(ids), ids, False),))
        runner.run(decode(encode(first)))
        blocks = tuple((3, index, 9 - index if index < told // 4 else 20 + index) for index in range(10))
        row = Row(3, told, len(ids) - told, ids[told:], True)
        second = StepPlan(FENCE, 2, (replace(ask.admit(), slot=3),), blocks, (row,), (Told(3, 0, ids[:told]),))
        found = [runner.run(decode(encode(second))).ids[0]]
        for step in range(3, 10):
            row = Row(3, len(ids) + step - 3, 1, None, True)
            found += runner.run(decode(encode(StepPlan(FENCE, step, rows=(row,))))).ids
        assert tuple(found) == whole[4:]


def test_repetition_penalty_is_that_of_transformers(checkpoint: Path, prompts: list[tuple[int, ...]]) -> None:
    asks = [
        Ask(prompt, 16, slot=slot, sampling=replace(GREEDY, repetition_penalty=1.3))
        for slot, prompt in enumerate(prompts)
    ]
    free = answer(checkpoint, [replace(ask, sampling=GREEDY) for ask in asks])
    penalised = answer(checkpoint, asks)
    assert penalised != free
    for ask, found in zip(asks, penalised, strict=True):
        assert found.ids == transformers_greedy(checkpoint, ask.prompt, ask.tokens, repetition_penalty=1.3)[0]


@pytest.mark.parametrize("chunk", [7, 64])
def test_prompts_are_scored_as_transformers_scores_them(
    chunk: int, checkpoint: Path, prompts: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.sampler._PIECE_ELEMENTS", 320 * 6)  # six rows a piece
    wanted = (5, 0, 3, None, 20)
    asks = [
        Ask(prompt, 3, slot=slot, scored=wanted[slot], chunk=chunk, logprobs=1) for slot, prompt in enumerate(prompts)
    ]
    for ask, found in zip(asks, answer(checkpoint, asks), strict=True):
        _, logprobs = transformers_greedy(checkpoint, ask.prompt, 1)
        if ask.scored is None:
            assert found.scores == ()
            continue
        for score, token, expected in zip(found.scores, ask.prompt[1:], logprobs[: len(ask.prompt) - 1], strict=True):
            assert score.logprob == pytest.approx(expected[token].item(), abs=1e-6)
            top = expected.topk(ask.scored)
            assert score.top_ids == tuple(top.indices.tolist())
            assert score.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-6)


@each_kind
def test_steps_may_be_launched_ahead_of_their_results(
    asks_of: Asks, checkpoint: Path, prompts: list[tuple[int, ...]]
) -> None:
    asks = asks_of(prompts)
    runner = new_runner(checkpoint, solo_context(CPU, torch.float64, FENCE.epoch))
    plans = plans_of(asks)
    pending = [runner.forward(decode(encode(plan))).pending for plan in plans]
    results = [step.result() for step in pending if step is not None]
    assert answers_of(asks, plans, results) == answer(checkpoint, asks)


@each_kind
def test_two_tensor_ranks_agree_and_sample_what_one_samples(
    asks_of: Asks, checkpoint: Path, prompts: list[tuple[int, ...]]
) -> None:
    asks = [
        replace(ask, start=ask.slot, logprobs=(2, None, 0)[ask.slot % 3], scored=(None, 1)[ask.slot % 2])
        for ask in asks_of(prompts)
    ]
    plans = plans_of(asks)

    def work(context: ParallelContext) -> list[StepResult]:
        runner = new_runner(checkpoint, context)
        return [runner.run(decode(encode(plan))) for plan in plans]

    first, second = as_two_ranks(work)
    assert first == second
    for two, one in zip(answers_of(asks, plans, first), answer(checkpoint, asks), strict=True):
        assert two.ids == one.ids
        assert_close(two, one)


def assert_close(two: Answer, one: Answer) -> None:
    for found, expected in zip(two.logprobs + two.scores, one.logprobs + one.scores, strict=True):
        if expected is None or found is None:
            assert found is expected
            continue
        assert found.top_ids == expected.top_ids
        assert found.logprob == pytest.approx(expected.logprob, abs=1e-6)


@each_kind
def test_launching_never_waits_for_the_device(asks_of: Asks, checkpoint: Path, prompts: list[tuple[int, ...]]) -> None:
    asks = [
        replace(ask, logprobs=(None, 3)[ask.slot % 2], scored=(2, None)[ask.slot % 2], start=ask.slot)
        for ask in asks_of(prompts)
    ]
    runner = new_runner(checkpoint, solo_context(CPU, torch.float64, FENCE.epoch))
    plans = [decode(encode(plan)) for plan in plans_of(asks)]
    with ForbidReadingBack():
        for plan in plans:
            runner.forward(plan)
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
