"""Decode steps through graphs: the tokens of eager steps, and padding that nobody notices.

Without a device the work is done anew over the same buffers in place of a graph; all else is what serves.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from echelon.errors import ConfigError
from echelon.internal.link import Sampling
from models.moe import Experts, MixtureOfExperts
from parallel import kernels
from parallel.context import ParallelContext, solo_context
from parallel.degrees import Degrees
from parallel.expert import ExchangedExperts, SplitExperts
from parallel.tensor import VocabularyHead
from tests.ranks import as_ranks
from tests.reading_back import ForbidReadingBack
from tests.tiny import make_checkpoint
from tests.unit.again import Again, Recorder
from tests.unit.paged_device import request
from tests.unit.pipelines import Pipeline
from tests.unit.plans import CPU, FENCE, GREEDY, Ask, new_runner, plans_of
from worker.decode_graphs import agreed, decode_rows, graph_sizes, refusal
from worker.limits import EngineLimits
from worker.plan import Lane, PlanTables, Row, StepPlan, StepResult, decode, encode, lane_of
from worker.runner import Runner

SIZES = (3, 8)  # so that most steps are padded
FAMILIES = ("llama", "gemma3", "qwen3-moe", "deepseek-v2")
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make_checkpoint(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def results(runner: Runner) -> list[StepResult]:
    """Of requests of all kinds, which begin one after the other."""
    draw = random.Random(5)
    settings = [
        GREEDY,
        Sampling(0.8, 0.9, 0, 99, seed=1),
        Sampling(1.0, 1.0, 5, 99, seed=2, repetition_penalty=1.5),
        Sampling(1.2, 1.0, 0, 99, seed=3),
        Sampling(0.0, 1.0, 0, 99, seed=4, presence_penalty=0.5),
    ]
    asks = []
    for i, (length, setting) in enumerate(zip((23, 7, 1, 14, 40), settings, strict=True)):
        prompt = tuple(draw.randrange(2, 300) for _ in range(length))
        asks.append(
            Ask(prompt, 8 + 2 * i, slot=7 - i, start=2 * (i % 3), sampling=setting, logprobs=2 if i == 1 else None)
        )
    return [runner.run(decode(encode(plan))) for plan in plans_of(asks)]


def check_same(found: list[StepResult], expected: list[StepResult]) -> None:
    """Log-probabilities up to what a product of another shape rounds otherwise."""
    for one, other in zip(found, expected, strict=True):
        assert (one.ids, one.faults, one.non_finite) == (other.ids, other.faults, other.non_finite)
        for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
            assert (mine and mine.top_ids) == (theirs and theirs.top_ids)
            assert (mine and mine.logprob) == pytest.approx(theirs and theirs.logprob, abs=1e-9)


def written(runner: Runner) -> Tensor:
    """Which numbers of the blocks that requests can have were ever written; all began as NaN."""
    cache = runner._kv_cache
    return torch.stack([~keys[: cache.num_blocks].isnan() for keys in (*cache.keys, *cache.values)])


def counted(runner: Runner) -> list[list[int]]:
    """How often each expert was chosen, by layer, as the counters have it."""
    found = []
    for layer in runner.model.layers:
        if isinstance(layer.mlp, MixtureOfExperts):
            match layer.mlp.dispatcher:
                case ExchangedExperts() as exchange:
                    found.append(exchange.map.loads.tolist())
                case SplitExperts(counted=Tensor() as rows):
                    found.append(rows.tolist())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_bring_the_tokens_of_eager_steps(family: str, checkpoints: dict[str, Path]) -> None:
    """They write where eager steps write, and count what these count."""
    context = solo_context(CPU, torch.float64, FENCE.epoch)
    eager, graphed = (new_runner(checkpoints[family], context, graphs=sizes) for sizes in ((), (1,)))
    recorder = Recorder()
    graphed.capture_graphs(recorder, SIZES)
    assert not written(graphed).any() and not any(map(sum, counted(graphed))), "to capture leaves nothing behind"
    check_same(results(graphed), results(eager))
    assert written(graphed).equal(written(eager))
    assert counted(graphed) == counted(eager)
    assert all(recorder.replays), "each size has served"


@pytest.mark.parametrize("degrees", [Degrees(), Degrees(tensor=2), Degrees(tensor=2, expert=2)], ids=str)
def test_what_padding_computes_stays_its_own(degrees: Degrees, checkpoints: dict[str, Path]) -> None:
    """Here it is NaN from the embedding on: of the id 0, which no request has."""

    def as_rank(context: ParallelContext, sizes: tuple[int, ...]) -> tuple[list[StepResult], list[list[int]]]:
        runner = new_runner(checkpoints["qwen3-moe"], context, graphs=sizes)
        assert runner.model.embedding is not None
        if context.place.tensor_rank == 0:
            runner.model.embedding.weight[0] = torch.nan
        return results(runner), counted(runner)

    def ranks(sizes: tuple[int, ...]) -> list[tuple[list[StepResult], list[list[int]]]]:
        return as_ranks(degrees, lambda context: as_rank(context, sizes), epoch=FENCE.epoch)

    graphed, eager = ranks(SIZES), ranks(())
    for (found, _), (expected, _) in zip(graphed, eager, strict=True):
        check_same(found, expected)
        assert not any(result.non_finite for result in found)
    # Of all ranks together: which of them routes a row depends on how many there are, padding included.
    assert np.sum([loads for _, loads in graphed], axis=0).tolist() == np.sum([loads for _, loads in eager], 0).tolist()


@pytest.mark.parametrize("degrees", [Degrees(), Degrees(tensor=2)], ids=str)
def test_a_graph_draws_greedy_rows_without_their_logits(
    degrees: Degrees, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all ranks; beside a row that is not greedy, or wants its log-probability, they are wanted."""
    dealt = VocabularyHead.dealt
    asked: list[int] = []

    def noted(head: VocabularyHead, part: Tensor) -> Tensor:
        asked.append(len(part))
        return dealt(head, part)

    monkeypatch.setattr(VocabularyHead, "dealt", noted)
    kinds = {"greedy": (GREEDY, None), "drawn": (Sampling(0.8, 0.9, 0, 99, seed=1), None), "scored": (GREEDY, 1)}

    def drawn(kind: str, sizes: tuple[int, ...]) -> list[list[tuple[int, ...]]]:
        """Ids of each step of each rank, and how many of them came with their log-probability."""
        sampling, logprobs = kinds[kind]
        asks = [
            Ask((7, 9), 6),
            Ask((5,), 6, slot=1, sampling=sampling, logprobs=logprobs),
        ]

        def as_rank(context: ParallelContext) -> list[tuple[int, ...]]:
            runner = new_runner(checkpoints["llama"], context, graphs=sizes)
            found = [runner.run(decode(encode(plan))) for plan in plans_of(asks)]
            return [(*result.ids, sum(logprob is not None for logprob in result.logprobs)) for result in found]

        return as_ranks(degrees, as_rank, epoch=FENCE.epoch)

    for kind in kinds:
        expected = drawn(kind, ())
        asked.clear()
        assert drawn(kind, SIZES) == expected
        assert bool(asked) == (kind != "greedy")


def test_a_step_keeps_its_ids_while_later_ones_are_replayed(checkpoints: dict[str, Path]) -> None:
    context = solo_context(CPU, torch.float64, FENCE.epoch)
    plans = [decode(encode(plan)) for plan in plans_of([Ask((7, 9), 8), Ask((5,), 8, slot=1)])]
    in_turn, ahead = (new_runner(checkpoints["llama"], context, graphs=SIZES) for _ in range(2))
    expected = [in_turn.run(plan).ids for plan in plans]
    queued = [ahead.forward(plan).pending for plan in plans]
    assert [pending.result().ids for pending in queued if pending is not None] == expected
    assert len(set(expected)) > 2, "ids change from step to step"


@pytest.mark.parametrize(
    ("family", "degrees"),
    [
        ("llama", Degrees(pipeline=2)),
        ("qwen3-moe", Degrees(data=2, expert=2)),
        pytest.param("qwen3-moe", Degrees(pipeline=2, data=2), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_stages_and_data_ranks_replay_the_same(family: str, degrees: Degrees, checkpoints: dict[str, Path]) -> None:
    """Also where one data rank has fewer rows than another, or none."""
    limits = EngineLimits(5, 60, 4, 16, 64, stages=degrees.pipeline, depth=degrees.pipeline, data=degrees.data)
    asked = [request(f"r{number}", [7 + number] * (3 + 2 * number), 4 + 2 * number) for number in range(5)]

    def answers(graphs: tuple[int, ...]) -> dict[str, list[int]]:
        with Pipeline(checkpoints[family], degrees, limits, graphs=graphs) as pipeline:
            found: dict[str, list[int]] = {}
            for run in pipeline.answer(asked).runs:
                found.setdefault(run.request, []).extend(run.ids)
            return found

    assert answers((1, 5)) == answers(())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_captured_never_waits_for_the_device(
    family: str, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for experts on a CPU, which are left out here."""
    monkeypatch.setattr(Experts, "__call__", lambda self, rows, copies: rows.clone())
    runner = new_runner(checkpoints[family], solo_context(CPU, torch.float64, FENCE.epoch), graphs=(1,))

    def capture(work: Callable[[], Tensor]) -> Again:
        with ForbidReadingBack():
            return Again(work)

    runner.capture_graphs(capture, SIZES)


def test_a_graph_that_was_let_go_of_serves_no_step(checkpoints: dict[str, Path]) -> None:
    runner = new_runner(checkpoints["llama"], solo_context(CPU, torch.float64, FENCE.epoch), graphs=SIZES)
    runner.reset_graphs()
    with pytest.raises(AssertionError, match="let go"):
        results(runner)


def test_a_step_that_cannot_be_captured_is_told_with_the_remedy(checkpoints: dict[str, Path]) -> None:
    runner = new_runner(checkpoints["llama"], solo_context(CPU, torch.float64, FENCE.epoch), graphs=(1,))

    def refuse(work: Callable[[], Tensor]) -> Again:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(ConfigError, match=r"step of 8 rows .* not permitted .* serve with cuda-graphs=off") as caught:
        runner.capture_graphs(refuse, SIZES)
    assert caught.value.field == "cuda_graphs"


@given(st.integers(1, 2000))
def test_sizes_are_close_together_and_end_with_the_most_rows(most_rows: int) -> None:
    sizes = graph_sizes(most_rows)
    assert list(sizes) == sorted({*sizes}) and sizes[-1] == most_rows and sizes[0] == 1
    for smaller, size in itertools.pairwise(sizes):
        assert size - smaller <= max(smaller, 8 if size <= 64 else 16 if size <= 256 else 32)


def test_sizes_of_a_full_batch() -> None:
    assert graph_sizes(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert graph_sizes(300) == (*graph_sizes(64), *range(80, 257, 16), 288, 300)


def tables(*rows: Row, lanes: tuple[Lane, ...] = ()) -> PlanTables:
    return decode(encode(StepPlan(FENCE, 1, rows=rows, lanes=lanes)))


def test_steps_of_sampled_decode_rows_alone_have_a_graph() -> None:
    decodes, prompt = Row(0, 5, 1, None, True), Row(1, 0, 1, (7,), True)
    unsampled = Row(2, 5, 1, None, False)
    assert [decode_rows(tables(*rows)) for rows in ([], [decodes], [decodes] * 3)] == [0, 1, 3]
    assert decode_rows(tables(decodes, prompt)) == decode_rows(tables(decodes, unsampled)) == 0


def test_data_ranks_agree_by_what_all_of_them_know() -> None:
    def lane(*rows: Row) -> Lane:
        return lane_of(StepPlan(FENCE, 1, rows=rows))

    decodes, prompt = Row(0, 5, 1, None, True), Row(1, 0, 1, (7,), True)
    assert decode_rows(tables(decodes, lanes=(lane(decodes), lane(*[decodes] * 4)))) == 4
    assert decode_rows(tables(lanes=(lane(), lane(decodes)))) == 1
    assert decode_rows(tables(decodes, lanes=(lane(decodes), lane(decodes, prompt)))) == 0
    assert decode_rows(tables(lanes=(lane(), lane()))) == 0


def test_what_is_not_captured_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_work_on", lambda device: True)
    assert refusal(True, CUDA, torch.bfloat16) == ""
    assert refusal(False, CUDA, torch.bfloat16) == "cuda-graphs is off"
    assert refusal(True, CPU, torch.float32) == "the device is cpu"
    assert refusal(True, CUDA, torch.float32) == "there are no kernels for float32"
    monkeypatch.setattr(kernels, "_work_on", lambda device: False)
    assert refusal(True, CUDA, torch.bfloat16) == "no kernel runs on the device"


@pytest.mark.parametrize("without", [None, 0, 1])
def test_a_rank_without_kernels_leaves_all_without_graphs(without: int | None) -> None:
    def as_rank(context: ParallelContext) -> str:
        return agreed("no kernel" if context.place.rank == without else "", context.replica)

    reasons = as_ranks(Degrees(tensor=2), as_rank, epoch=FENCE.epoch)
    assert [bool(reason) for reason in reasons] == [without is not None] * 2
    assert without is None or reasons[without] == "no kernel"
