"""Every family in layouts of every kind: transformers' answers, the plan's bytes, the schedule's operations.

The product of families and layouts is gone through by one cluster, which is re-laid out; in short, a pairwise cover of
it. Answers are checked while prompts, decoding, cancellations and preemptions mix.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from echelon import CancelledError, Completion, SamplingParams
from echelon.testing import LocalCluster
from echelon.types import Rank
from models.config import ModelConfig, read_model_config
from models.tables import held_layers, held_parameters
from parallel.degrees import Degrees, Place
from parallel.schedule import Kind, Op, next_op, stage_state
from parallel.timeline import OpRecord
from parallel.trace import parse_records
from tests.cluster.calls import eventually
from tests.cluster.conftest import Case, Checkpoints, Walker
from tests.cluster.layouts import COVER, PRODUCT, Layout, pairs
from tests.cluster.reference import Reference
from tests.cluster.streams import PROMPT

pytestmark = pytest.mark.cluster

FLOAT64_BYTES = 8
# Six choices of one request begin together and want more blocks than there are; prompts come in chunks beside that.
SMALL = {"max_running": 6, "max_step_tokens": 24, "max_context": 128, "kv_cache_tokens": 128}
GREEDY = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True, logprobs=0)
TEXTS = [f"{number} {PROMPT}"[: 12 + 5 * number] for number in range(8)]
CHOICES = [1] * (len(TEXTS) - 1) + [6]


def parameters() -> Iterator[object]:
    """The cover, and what the product has besides."""
    for layout in COVER:
        yield pytest.param(layout, id=str(layout))
    for layout in PRODUCT:
        yield pytest.param(layout, id=f"{layout}-of-product", marks=pytest.mark.long)


def test_the_cover_has_each_pair_of_the_product() -> None:
    covered = {layout.family for layout in COVER}
    assert pairs(COVER) == pairs(layout for layout in PRODUCT if layout.family in covered)
    assert covered >= {"llama", "mixtral", "qwen3-moe"}


@pytest.mark.parametrize("layout", parameters())
def test_answers_bytes_and_operations(
    layout: Layout,
    walker: Walker,
    checkpoints: Checkpoints,
    reference_of: Callable[[Path], Reference],
) -> None:
    directory, begun_s = checkpoints[layout.checkpoint], time.monotonic()
    cluster = walker.serve(directory, layout, **SMALL)
    case = Case(str(layout), cluster, reference_of(directory))
    laid_out_s = time.monotonic() - begun_s
    answers = answer_all(case)
    sys.stdout.write(f"{layout}: laid out in {laid_out_s:.2f} s, answered in {time.monotonic() - begun_s:.2f} s\n")
    for text, choices, answer in zip(TEXTS, CHOICES, answers, strict=True):
        assert len(answer.choices) == choices
        assert_equals_transformers(case, text, answer)
    counters = case.counters()
    happened = {name for name in ("preemptions", "chunked_prompts", "decode_rows") if counters[name]}
    assert happened == {"preemptions", "chunked_prompts", "decode_rows"}
    assert_bytes(cluster, read_model_config(directory), layout.degrees)
    assert_expert_load(cluster, read_model_config(directory), layout.degrees)
    epoch = cluster.status().replicas[0].epoch
    assert_executed(read_logs(walker.trace_dir, epoch, layout.degrees), layout.degrees)


def answer_all(case: Case) -> list[Completion]:
    """All texts at once, while two others are cancelled in their middle."""
    client = case.cluster.client()

    def cancelled(number: int) -> None:
        request_id = f"cancelled-{case.name}-{number}"
        stream = client.stream(f"{number} {PROMPT}", sampling=GREEDY, request_id=request_id)
        next(stream)
        client.cancel(request_id)
        try:
            list(stream)
        except CancelledError:
            return

    with ThreadPoolExecutor(len(TEXTS) + 2) as pool:
        dropped = [pool.submit(cancelled, number) for number in range(2)]
        asked = [replace(GREEDY, n=choices) for choices in CHOICES]
        answers = list(pool.map(lambda text, sampling: client.generate(text, sampling=sampling), TEXTS, asked))
        for one in dropped:
            one.result()
    return answers


def assert_equals_transformers(case: Case, text: str, answer: Completion) -> None:
    """Every choice of the answer: greedy ones are alike."""
    expected = case.reference.after_each(text, answer.token_ids)
    for choice in answer.choices:
        assert len(choice.token_ids) == GREEDY.max_tokens
        assert choice.token_ids == expected.ids
        assert [one.logprob for one in choice.logprobs] == pytest.approx(expected.logprobs, abs=1e-6, rel=0)


def assert_expert_load(cluster: LocalCluster, config: ModelConfig, degrees: Degrees) -> None:
    """Every layer with experts has chosen for each row that was computed: all layers for alike many."""
    sparse = {number: layer.routing for number, layer in enumerate(config.layers) if layer.routing is not None}

    def rows() -> set[int]:
        loads = cluster.client().expert_load()
        assert {load.layer for load in loads} <= set(sparse)
        if len(loads) < len(sparse):
            return set()
        for load in loads:
            assert len(load.rows) == sparse[load.layer].experts
            assert len(load.slots) == (degrees.expert if degrees.exchanges_rows else 0)
        return {sum(load.rows) for load in loads}

    def problem() -> str:
        found = rows()
        return "" if len(found) == min(len(sparse), 1) else f"layers tell of {found} choices"

    *_, said = eventually(problem, 10.0, 0.2)  # ranks tell once a second
    assert not said
    assert all(total > 0 and total % routing.experts_per_token == 0 for total in rows() for routing in sparse.values())


def assert_bytes(cluster: LocalCluster, config: ModelConfig, degrees: Degrees) -> None:
    """What is resident is what was planned; experts and blocks are counted by hand."""
    status = cluster.status()
    assert len(status.ranks) == degrees.replica_ranks
    for rank in status.ranks:
        assert rank.parameter_bytes == rank.planned_parameter_bytes
        assert rank.kv_bytes == rank.planned_kv_bytes
        place = place_of(rank, degrees)
        assert rank.expert == place.expert_rank
        held = [parameter for parameter in held_parameters(config, place) if parameter.expert is None]
        dense = sum(math.prod(parameter.held_shape(degrees)) for parameter in held)
        assert rank.parameter_bytes == (dense + expert_numbers(config, place)) * FLOAT64_BYTES
        heads = -(-config.num_key_value_heads // degrees.tensor)
        numbers = (
            2 * heads * config.head_dim if config.latent is None else config.latent.rank + config.latent.rotary_dim
        )
        position = len(held_layers(config, place)) * numbers * FLOAT64_BYTES
        assert rank.kv_bytes == SMALL["kv_cache_tokens"] * position
    layers = [held_layers(config, degrees.place(stage * degrees.stage_ranks)) for stage in range(degrees.pipeline)]
    assert [layer for held in layers for layer in held] == list(range(config.num_hidden_layers))
    assert all(layers)


def expert_numbers(config: ModelConfig, place: Place) -> int:
    """Numbers in the experts of a rank: an equal part of all the experts of its stage's layers."""
    routings = [config.layers[layer].routing for layer in held_layers(config, place)]
    whole = sum(each.experts * 3 * config.hidden_size * each.neurons for each in routings if each is not None)
    assert whole % place.degrees.stage_ranks == 0
    return whole // place.degrees.stage_ranks


def place_of(rank: Rank, degrees: Degrees) -> Place:
    return Place(degrees, rank.pipeline, rank.data, rank.tensor)


def read_logs(folder: Path, epoch: int, degrees: Degrees) -> dict[Place, list[OpRecord]]:
    """What each rank has logged, once all of them have done and logged all that any has begun."""

    def read() -> dict[Place, list[OpRecord]]:
        found = {}
        for place in map(degrees.place, range(degrees.replica_ranks)):
            suffix = f"p{place.pipeline_rank}-d{place.data_rank}-t{place.tensor_rank}"
            path = folder / f"replica-0-epoch-{epoch}-{suffix}.jsonl"
            found[place] = parse_records(path.read_text().splitlines(), path.name)
        return found

    def unfinished() -> bool:
        counts = {
            len([record for record in records if record.op.kind is kind])
            for place, records in read().items()
            for kind in Kind
            if kind is Kind.FORWARD or (degrees.pipeline > 1 and (place.first_stage or place.last_stage))
        }
        return len(counts) > 1

    list(eventually(unfinished, timeout_s=30.0, pause_s=0.1))
    return read()


def assert_executed(logs: dict[Place, list[OpRecord]], degrees: Degrees) -> None:
    """Ranks of a stage did the same, all stages the same micro-batches, and each what next_op gave it to do."""
    done = {place: [(record.epoch, record.step, record.op) for record in records] for place, records in logs.items()}
    for place, records in done.items():
        assert records == done[Place(degrees, place.pipeline_rank, 0, 0)]
        ops = [op for _, _, op in records]
        assert_follows(ops, degrees, place)
        assert all(record.stage == place.pipeline_rank for record in logs[place])
        assert len({epoch for epoch, _, _ in records}) == 1
        assert [step for _, step, _ in records] == [op.microbatch + 1 for op in ops]
        forward = [op.microbatch for op in ops if op.kind is Kind.FORWARD]
        assert forward == list(range(len(forward))) and len(forward) == len(forwards_of(done[degrees.place(0)]))


def forwards_of(records: list[tuple[int, int, Op]]) -> list[Op]:
    return [op for _, _, op in records if op.kind is Kind.FORWARD]


def assert_follows(ops: list[Op], degrees: Degrees, place: Place) -> None:
    """next_op gives these operations for a stream of plans; as many micro-batches were out as may be, never more."""
    state = stage_state(place.pipeline_rank, degrees.pipeline, depth=degrees.pipeline)
    most = 0
    for op in ops:
        assert next_op(state.announce() if op.kind is Kind.FORWARD else state.drain()) == op
        state = (state.announce() if op.kind is Kind.FORWARD else state).apply(op)
        if degrees.pipeline == 1:  # nothing has to come back to a stage alone, so its returns are no operations
            state = state.apply(Op(Kind.BACK, op.microbatch))
        most = max(most, state.in_flight)
    if degrees.pipeline > 1 and place.first_stage:
        assert most == degrees.pipeline
    if degrees.pipeline > 1 and (place.first_stage or place.last_stage):
        assert state.in_flight == 0, "all that went forward came back"
