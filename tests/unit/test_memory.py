"""The blocks that ranks settle on: the smallest of what each can have, and enough for one request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import Tensor

from echelon.errors import ConfigError
from echelon.internal.v1 import control_pb2
from models.config import read_model_config
from models.registry import build_model
from parallel.comm import Group, Work
from parallel.context import ParallelContext, solo_context
from parallel.degrees import Degrees
from tests.ranks import as_ranks
from tests.tiny import make_checkpoint
from tests.unit.plans import new_runner
from worker import memory
from worker.kv_cache import KVCache
from worker.limits import decode_places
from worker.loader import load_weights
from worker.matchers import Matchers
from worker.memory import has_settled, largest_step, lone_step, rehearse, settle_kv_blocks
from worker.plan import PlanTables, StepResult, decode, encode
from worker.runner import Runner, RunnerLimits


def no_tokenizer() -> NoReturn:
    raise AssertionError("no constraint is admitted")


NO_MATCHERS = Matchers(no_tokenizer, 1)


@dataclass
class Neighbour:
    """A group of two whose other rank can have this many blocks."""

    blocks: int

    def _allgather_base(self, output: Tensor, own: Tensor, options: object) -> Work:
        output[:1], output[1:] = own, self.blocks
        return self

    def wait(self) -> None:
        return None


def settle(folder: Path, neighbour: int, wanted: int, limit: int = 0) -> int:
    config = read_model_config(make_checkpoint(folder / "model"))
    context = ParallelContext(
        epoch=1,
        replica=Group(0, 2, Neighbour(neighbour)),  # type: ignore[arg-type]
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    command = control_pb2.FormEpoch(
        kv_blocks=wanted,
        block_tokens=16,
        max_context=64,
        max_running=4,
        max_step_tokens=32,
        kv_blocks_limit=limit,
    )
    return settle_kv_blocks(None, config, context, command, None, graphs=False).held  # type: ignore[arg-type]


def test_ranks_settle_on_the_smallest_answer(tmp_path: Path) -> None:
    assert settle(tmp_path, 7, 100) == 7
    assert settle(tmp_path, 700, 100) == 100


def test_a_limit_is_kept_and_gives_no_blocks_that_are_not_there(tmp_path: Path) -> None:
    assert settle(tmp_path, 700, 100, limit=9) == 9
    assert settle(tmp_path, 7, 100, limit=9) == 7


def test_what_ranks_have_settled_before_is_taken_over_and_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: object) -> NoReturn:
        raise AssertionError("it is known what a step takes")

    monkeypatch.setattr(memory, "_peak_bytes", run)
    config = read_model_config(make_checkpoint(tmp_path / "model"))
    context = ParallelContext(epoch=1, device=torch.device("cuda"), dtype=torch.bfloat16)
    command = control_pb2.FormEpoch(kv_blocks=100, block_tokens=16, max_context=64, max_running=4, max_step_tokens=32)
    command.settled.CopyFrom(control_pb2.Settled(reserved_blocks=13, graphs=False))

    def settled(graphs: bool) -> tuple[int, int]:
        return settle_kv_blocks(None, config, context, command, NO_MATCHERS, graphs)  # type: ignore[arg-type]

    assert settled(graphs=False) == (87, 13)
    command.kv_blocks_limit = 20
    assert settled(graphs=False) == (20, 13), "the limit is not what is reserved"
    assert not has_settled(command, graphs=True), "nobody has settled what graphs take"
    command.settled.graphs = True
    assert settled(graphs=True) == (20, 13) and has_settled(command, graphs=False)
    command.ClearField("settled")
    assert not has_settled(command, graphs=False)


def test_less_than_one_request_is_refused_with_the_arithmetic(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"3 blocks of 16 tokens .* max-context 64 needs 4; lower max-context to 48"):
        settle(tmp_path, 3, 100)


@pytest.mark.parametrize(
    ("running", "step_tokens", "decoding", "chunks"),
    [(1, 8, 0, [8]), (4, 32, 2, [23, 7]), (64, 16, 15, [1]), (4, 200, 0, [23] * 4), (8, 100, 3, [23] * 4 + [5])],
)
def test_the_largest_step_fills_the_budget_and_every_slot_it_can(
    running: int, step_tokens: int, decoding: int, chunks: list[int]
) -> None:
    """Of contexts of 23 tokens, behind which an id can still be drawn."""
    plan = largest_step(running, 24, step_tokens, epoch=3)
    assert plan.fence.epoch == 3
    assert [row.given for row in plan.rows[:decoding]] == [None] * decoding
    assert [row.tokens for row in plan.rows] == [1] * decoding + chunks
    assert {row.first + row.tokens for row in plan.rows} == {23}
    assert [admit.slot for admit in plan.admits] == [row.slot for row in plan.rows] == [*range(len(plan.rows))]


def test_a_step_with_drafts_has_no_more_rows_than_a_full_batch_or_one_choice_with_its_drafts() -> None:
    assert [decode_places(*sizes) for sizes in ((64, 0), (64, 4), (4, 4), (1, 4))] == [64, 64, 5, 5]


@pytest.mark.parametrize(("running", "step_tokens"), [(1, 8), (4, 32), (8, 100)])
def test_the_largest_step_runs_over_a_cache_of_one_block(tmp_path: Path, running: int, step_tokens: int) -> None:
    directory = make_checkpoint(tmp_path / "model")
    context = solo_context(torch.device("cpu"), torch.float32, epoch=3)
    config = read_model_config(directory)
    model = build_model(config, context)
    load_weights(model, config, directory, context, lambda loaded, total: None)
    runner = Runner(model, KVCache(config, context, 1, 16), context, RunnerLimits(running, 24, 16), NO_MATCHERS)
    plan = largest_step(running, 24, step_tokens, epoch=3)
    result = runner.run(decode(encode(plan)))
    assert len(result.ids) == len(plan.rows) and all(logprob is not None for logprob in result.logprobs)


@pytest.mark.parametrize(
    "degrees",
    [Degrees(), Degrees(tensor=2), Degrees(pipeline=2), Degrees(data=2, expert=2), Degrees(tensor=2, expert=2)],
    ids=lambda degrees: f"{degrees.pipeline}{degrees.data}{degrees.tensor}{degrees.expert}",
)
def test_what_is_run_before_a_rank_serves_runs_on_every_layout(tmp_path: Path, degrees: Degrees) -> None:
    directory = make_checkpoint(tmp_path / "model", "qwen3-moe")
    plans = largest_step(4, 24, 16, epoch=3), lone_step(24, epoch=3)

    def as_rank(context: ParallelContext) -> list[int]:
        runner = new_runner(directory, context, RunnerLimits(4, 24, 16), 1)
        drawn: list[int] = []
        run = runner.run

        def watched(tables: PlanTables) -> StepResult:
            result = run(tables)
            drawn.append(len(result.ids))
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "run", watched)
            rehearse(runner, plans, context)
        return drawn

    drawn = as_ranks(degrees, as_rank, torch.float32, epoch=3)
    assert drawn[0] == [4, 1] and all(len(ids) == len(plans) for ids in drawn)
    assert lone_step(24, epoch=3).rows[0].first == 22 and lone_step(1, epoch=3).rows[0].first == 0
