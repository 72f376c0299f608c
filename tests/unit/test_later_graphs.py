"""Graphs that ranks capture between the steps of an epoch that serves: same answers, and what a failure comes to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from echelon.errors import ConfigError
from parallel.comm import of_peer
from parallel.context import ParallelContext, solo_context
from parallel.degrees import Degrees
from parallel.mesh import close
from tests.predicting import make_circle
from tests.ranks import as_ranks
from tests.tiny import make_checkpoint
from tests.unit.again import Again, Recorder
from tests.unit.paged_device import request
from tests.unit.pipelines import Pipeline
from tests.unit.plans import CPU, FENCE, new_runner
from worker.cuda_capture import Capture, CaptureRefused
from worker.later_graphs import Later
from worker.limits import EngineLimits
from worker.plan import Row, StepPlan, decode, encode

SIZES = (1, 3, 5)
ASKED = [request(f"r{number}", [7 + number] * (3 + 2 * number), 14 + 2 * number) for number in range(5)]


def limits(degrees: Degrees, captures: tuple[int, ...], depth: int = 1) -> EngineLimits:
    stages, data = degrees.pipeline, degrees.data
    return EngineLimits(5, 90, 4, 16, 64, stages=stages, depth=max(depth, stages), data=data, captures=captures)


class Answered:
    """What a replica has answered, and what became of its graphs; of each rank."""

    def __init__(self, model: Path, limits: EngineLimits, degrees: Degrees, capture: Callable[[int], Capture]) -> None:
        self.ids: dict[str, list[int]] = {}
        with Pipeline(model, degrees, limits, capture=capture) as pipeline:
            for run in pipeline.answer(ASKED).runs:
                self.ids.setdefault(run.request, []).extend(run.ids)
        self.asked = [plan.captures for plan in pipeline.plans if plan and plan.captures]
        self.later = [rank.captured for rank in pipeline.ranks]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make_checkpoint(tmp_path_factory.mktemp(family), family) for family in ("llama", "qwen3-moe")}


@pytest.mark.parametrize(
    ("family", "degrees", "depth"),
    [
        ("llama", Degrees(), 1),
        ("qwen3-moe", Degrees(tensor=2, expert=2), 1),
        ("qwen3-moe", Degrees(data=2, expert=2), 1),
        ("llama", Degrees(pipeline=2), 3),
        pytest.param("qwen3-moe", Degrees(pipeline=2, data=2), 2, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_steps_go_eagerly_until_there_are_graphs(
    family: str, degrees: Degrees, depth: int, models: dict[str, Path]
) -> None:
    recorders = [Recorder() for _ in range(degrees.replica_ranks)]
    found = Answered(models[family], limits(degrees, SIZES, depth), degrees, recorders.__getitem__)
    eager = Answered(models[family], limits(degrees, (), depth), degrees, recorders.__getitem__)
    assert found.ids == eager.ids
    assert sorted(found.asked) == list(SIZES) and found.asked[0] == max(SIZES) and not eager.asked
    assert [[(later.captured, later.reason) for later in of_rank] for of_rank in found.later] == [
        [(len(SIZES), "")]
    ] * degrees.replica_ranks
    assert all(len(recorder.made) == len(SIZES) and sum(recorder.replays) > 0 for recorder in recorders)


@pytest.mark.parametrize("refusing", [0, 1])
def test_where_one_rank_is_refused_all_of_the_stage_go_on_with_what_they_have(
    refusing: int, models: dict[str, Path]
) -> None:
    """No request is lost, and nothing is captured behind the refusal."""
    recorders = [Recorder(), Recorder()]

    def capture(rank: int) -> Capture:
        def work_of(work: Callable[[], Tensor]) -> Again:
            made = recorders[rank](work)
            if rank == refusing and len(recorders[rank].made) == 2:
                raise CaptureRefused("operation not permitted")
            return made

        return work_of

    degrees = Degrees(tensor=2)
    found = Answered(models["llama"], limits(degrees, SIZES), degrees, capture)
    eager = Answered(models["llama"], limits(degrees, ()), degrees, capture)
    assert found.ids == eager.ids
    assert len(found.asked) == len(SIZES), "the leader need not know"
    for rank, (later,) in enumerate(found.later):
        assert later.captured == 1 and len(recorders[rank].made) == 2
        refused = f"a decode step of {found.asked[1]} rows: operation not permitted"
        assert later.reason == (refused if rank == refusing else "another rank of the stage could not")
        first, second = recorders[rank].replays
        assert first > 0 and second == 0
    with pytest.raises(AssertionError, match="let go"):
        recorders[1 - refusing].made[1].replay()


def decodes(captures: int = 0, step: int = 1) -> StepPlan:
    return StepPlan(FENCE, step, blocks=((0, 1, 0),), rows=(Row(0, 5, 1, None, True),), captures=captures)


def test_an_error_of_the_work_comes_with_the_remedy_and_is_of_no_request(models: dict[str, Path]) -> None:
    runner = new_runner(models["llama"], solo_context(CPU, torch.float64, FENCE.epoch), padded=True)

    def breaks(work: Callable[[], Tensor]) -> Again:
        raise RuntimeError("CUDA out of memory")

    runner.capture_later(breaks, SIZES, lambda later: None)
    with pytest.raises(ConfigError, match=r"step of 3 rows .* out of memory; serve with cuda-graphs=off"):
        runner.run(decode(encode(decodes(captures=3))))


@pytest.mark.long
def test_a_rank_that_dies_while_others_capture_is_a_fault_like_others(models: dict[str, Path]) -> None:
    """Those that wait for it in what is captured tell that a peer is gone, whose requests nobody blames."""
    found: dict[int, Exception] = {}

    def as_rank(context: ParallelContext) -> None:
        runner = new_runner(models["llama"], context, padded=True)

        def dies(work: Callable[[], Tensor]) -> Again:
            close(context)
            raise RuntimeError("the device is lost")

        runner.capture_later(Again if context.tensor.rank == 0 else dies, SIZES, lambda later: None)
        try:
            runner.run(decode(encode(decodes(captures=3))))
        except Exception as error:
            found[context.tensor.rank] = error
            raise

    with pytest.raises(Exception, match=r".+"):
        as_ranks(Degrees(tensor=2), as_rank, epoch=FENCE.epoch)
    assert of_peer(found[0]) and not isinstance(found[0], ConfigError)
    assert isinstance(found[1], ConfigError)


def test_what_is_captured_while_all_are_let_go_of_is_let_go_of_too(models: dict[str, Path]) -> None:
    """The epoch ends in another thread while a graph is half captured: its groups are closed behind it."""
    runner = new_runner(models["llama"], solo_context(CPU, torch.float64, FENCE.epoch), padded=True)
    recorder, told = Recorder(), list[Later]()

    def ends_meanwhile(work: Callable[[], Tensor]) -> Again:
        made = recorder(work)
        runner.reset_graphs()
        return made

    runner.capture_later(ends_meanwhile, SIZES, told.append)
    with pytest.raises(AssertionError, match="let go"):  # as whatever runs in an epoch that has ended
        runner.run(decode(encode(decodes(captures=5))))
    with pytest.raises(AssertionError, match="let go"):
        recorder.made[0].replay()
    assert not told


@pytest.mark.parametrize("fails", [True, False])
def test_both_graphs_of_a_model_that_predicts_are_let_go_of(tmp_path: Path, fails: bool) -> None:
    """When the second is refused, and when the epoch ends."""
    model = make_circle(tmp_path / "model")
    runner = new_runner(model, solo_context(CPU, torch.float64, FENCE.epoch), predicts=True, padded=True)
    recorder, told = Recorder(), list[Later]()

    def capture(work: Callable[[], Tensor]) -> Again:
        if fails and len(recorder.made) == 1:
            raise CaptureRefused("not permitted")
        return recorder(work)

    runner.capture_later(capture, (3,), told.append)
    result = runner.run(decode(encode(decodes(captures=3))))
    assert len(result.drafts) == 1 and told[0].captured == (not fails)
    assert recorder.replays == ([0] if fails else [1, 1])
    if not fails:
        runner.reset_graphs()
    for made in recorder.made:
        with pytest.raises(AssertionError, match="let go"):
            made.replay()
