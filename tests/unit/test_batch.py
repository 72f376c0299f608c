"""From plans to tensors: rows laid out, state applied in order, the rows shared out between ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from echelon.internal.link import Fence, Sampling
from models.batch import ForwardBatch
from parallel.expert import ExpertStep
from worker.batch import Share, StepBatch, apply_and_build
from worker.plan import Admit, Row, StepPlan, Told, decode, encode
from worker.slots import SlotState

FENCE = Fence(1, 0, 1)
BLOCK_TOKENS = 4


def new_state() -> SlotState:
    return SlotState(max_running=6, max_context=20, block_tokens=BLOCK_TOKENS, device=torch.device("cpu"))


def build(state: SlotState, plan: StepPlan, rank: int = 0, ranks: int = 1) -> StepBatch:
    return apply_and_build(decode(encode(plan)), state, rank, ranks, piece_rows=64)


def forward(batch: StepBatch) -> ForwardBatch:
    assert isinstance(batch.forward, ForwardBatch)
    return batch.forward


def admit(
    slot: int, choice: int = 0, seed: int = 0, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0
) -> Admit:
    return Admit(slot, choice, 3, Sampling(temperature, top_p, top_k, 100, seed))


def chunk(slot: int, first: int, *given: int, sampled: bool = False, logprobs: int | None = None) -> Row:
    return Row(slot, first, len(given), given, sampled, logprobs)


def decode_row(slot: int, first: int, logprobs: int | None = None) -> Row:
    return Row(slot, first, 1, None, True, logprobs)


def lists(batch: ForwardBatch) -> dict[str, object]:
    names = ("token_ids", "positions", "slot_mapping", "decode_block_tables", "decode_context_lens", "sample_index")
    return {name: getattr(batch, name).tolist() for name in names}


def test_a_mixed_step_is_laid_out_with_decode_rows_first() -> None:
    state = new_state()
    state.history[:] = torch.arange(6)[:, None] * 100 + torch.arange(20)
    plan = StepPlan(
        FENCE,
        step=1,
        blocks=((3, 0, 9), (3, 1, 7), (1, 0, 2), (4, 0, 11), (4, 1, 12), (4, 2, 13)),
        rows=(
            decode_row(3, first=5),
            decode_row(1, first=0),
            chunk(4, 6, 60, 61, 62, 63, sampled=True),
            chunk(0, 0, 50, 51),
        ),
    )
    batch = build(state, plan)
    assert lists(forward(batch)) == {
        "token_ids": [305, 100, 60, 61, 62, 63, 50, 51],
        "positions": [5, 0, 6, 7, 8, 9, 0, 1],
        "slot_mapping": [7 * 4 + 1, 2 * 4, 12 * 4 + 2, 12 * 4 + 3, 13 * 4, 13 * 4 + 1, 0, 1],
        "decode_block_tables": [[9, 7], [2, 0]],
        "decode_context_lens": [6, 1],
        "sample_index": [0, 1, 5],
    }
    assert forward(batch).num_decode_rows == 2
    assert forward(batch).experts == ExpertStep(decode=False, rows_per_rank=(8,))
    first, second = forward(batch).prefill
    assert (first.offset, first.tokens, first.context_len, first.block_table.tolist()) == (2, 4, 10, [11, 12, 13])
    assert (second.offset, second.tokens, second.context_len, len(second.block_table)) == (6, 2, 2, 1)
    assert batch.slots.tolist() == [3, 1, 4]
    assert batch.sampling.position.tolist() == [6, 1, 10]  # of the id to draw, not of the one read


def test_blocks_that_a_decode_row_does_not_use_yet_are_padded_with_zero() -> None:
    state = new_state()
    state.block_tables[:] = 99  # what earlier owners of the slots left
    rows = (decode_row(0, first=3), decode_row(1, first=8))
    batch = build(state, StepPlan(FENCE, 1, blocks=((0, 0, 5), (1, 0, 6), (1, 1, 7), (1, 2, 8)), rows=rows))
    assert forward(batch).experts == ExpertStep(decode=True, rows_per_rank=(2,))
    assert forward(batch).decode_block_tables.tolist() == [[5, 0, 0], [6, 7, 8]]


def test_admitted_sampling_arrives_exact_and_stays_until_the_slot_is_taken_again() -> None:
    state = new_state()
    seeds = (-1, 2**63 - 1, -(2**63), 0x1234_5678_9ABC_DEF0)
    admits = tuple(admit(slot, slot + 1, seed, 0.75, 0.5, 40) for slot, seed in enumerate(seeds))
    build(state, StepPlan(FENCE, 1, admits=admits))
    taken = (admit(1, 9, 5, 0.1, 1.0, 0),)
    batch = build(state, StepPlan(FENCE, 2, admits=taken, rows=tuple(decode_row(slot, 7) for slot in range(4))))
    assert batch.sampling.seed.tolist() == [-1, 5, -(2**63), 0x1234_5678_9ABC_DEF0]
    assert batch.sampling.choice.tolist() == [1, 9, 3, 4]
    assert batch.sampling.temperature.tolist() == [0.75, 0.1, 0.75, 0.75]
    assert batch.sampling.top_p.tolist() == [0.5, 1.0, 0.5, 0.5]
    assert batch.sampling.top_k.tolist() == [40, 0, 40, 40]
    assert batch.sampling.position.tolist() == [8] * 4


def test_the_sampling_path_follows_from_the_parameters() -> None:
    settings = ((0.0, 0.5, 3), (1.0, 1.0, 0), (1.0, 0.9, 0), (1.0, 1.0, 5), (0.0, 1.0, 0), (1e-300, 1.0, 0))
    admits = tuple(admit(slot, 0, 0, *setting) for slot, setting in enumerate(settings))
    batch = build(new_state(), StepPlan(FENCE, 1, admits=admits, rows=tuple(decode_row(slot, 0) for slot in range(6))))
    assert batch.paths.plain.tolist() == [1]
    assert batch.paths.truncated.tolist() == [2, 3]


def test_rows_without_sample_are_left_out_and_logprobs_keep_row_order() -> None:
    plan = StepPlan(
        FENCE,
        1,
        rows=(
            decode_row(0, 3, logprobs=0),
            decode_row(1, 3),
            chunk(2, 0, 1, 2, 3),
            chunk(3, 0, 4, sampled=True, logprobs=5),
        ),
    )
    batch = build(new_state(), plan)
    assert batch.slots.tolist() == [0, 1, 3]
    assert forward(batch).sample_index.tolist() == [0, 1, 5]
    assert batch.logprobs == (0, None, 5)
    assert batch.logprob_rows.tolist() == [0, 2]


def test_the_history_holds_every_id_at_its_position() -> None:
    state = new_state()
    state.history.fill_(-7)
    told = (Told(4, 0, (10, 11, 12)), Told(5, 1, (20,)))
    rows = (decode_row(0, 2), chunk(4, 3, 13, 14), chunk(1, 7, 30, sampled=True))
    batch = build(state, StepPlan(FENCE, 1, rows=rows, told=told))
    assert forward(batch).token_ids.tolist() == [-7, 13, 14, 30]
    state.write(batch.slots, batch.positions, torch.tensor([40, 41]))  # what the step samples
    written = {
        (slot, place): int(state.history[slot, place]) for slot, place in (state.history != -7).nonzero().tolist()
    }
    assert written == {
        **{(4, position): 10 + position for position in range(5)},
        (5, 1): 20,
        (1, 7): 30,
        (0, 3): 40,
        (1, 8): 41,
    }
    assert forward(build(state, StepPlan(FENCE, 2, rows=(decode_row(1, 8),)))).token_ids.tolist() == [41]


def test_scored_tokens_come_after_the_sampled_ones_with_the_ids_that_follow_them() -> None:
    def scored(row: Row, alternatives: int, next_id: int | None) -> Row:
        return row._replace(scored=alternatives, next_id=next_id)

    rows = (
        decode_row(0, 2),
        scored(chunk(1, 0, 30, 31, 32), 2, 33),
        chunk(2, 0, 40, 41),
        scored(chunk(3, 6, 50, 51, sampled=True), 0, None),
        scored(chunk(4, 6, 60, sampled=True), 1, None),
    )
    batch = build(new_state(), StepPlan(FENCE, 1, rows=rows))
    assert forward(batch).sample_index.tolist() == [0, 7, 8, 1, 2, 3, 6]
    assert batch.targets.tolist() == [31, 32, 33, 51]
    assert batch.scored == ((3, 2), (1, 0), (0, 1))
    assert batch.slots.tolist() == [0, 3, 4]


def test_a_plan_without_rows_changes_state_alone() -> None:
    state = new_state()
    batch = build(state, StepPlan(FENCE, 1, admits=(admit(2),), blocks=((2, 1, 8),)))
    assert state.block_tables[2].tolist() == [0, 8, 0, 0, 0]
    assert forward(batch).token_ids.shape == (0,)
    assert forward(batch).decode_block_tables.shape == (0, 0)
    assert batch.logprobs == ()


def test_every_sampled_row_is_in_the_share_of_exactly_one_rank() -> None:
    for sampled in range(9):
        for ranks in (1, 2, 3, 4):
            shares = [Share.of(sampled, rank, ranks) for rank in range(ranks)]
            held = [row for share in shares for row in range(share.start, share.start + share.size)]
            assert held == list(range(sampled))
            assert {share.padded for share in shares} == {-(-sampled // ranks) * ranks}
            per_rank = shares[0].padded // ranks
            assert all(share.size == 0 or share.start == rank * per_rank for rank, share in enumerate(shares))


def test_ranks_split_the_sampling_of_a_step_and_agree_on_the_rest() -> None:
    admits = tuple(admit(slot, 0, slot, float(slot % 2)) for slot in range(5))
    rows = tuple(decode_row(slot, 2, logprobs=1 if slot == 4 else None) for slot in range(5))
    batches = [build(new_state(), StepPlan(FENCE, 1, admits=admits, rows=rows), rank, 2) for rank in range(2)]

    def seeds(batch: StepBatch, rows: Tensor) -> list[int]:
        return batch.sampling.seed[rows].tolist()

    assert [batch.sampling.seed.tolist() for batch in batches] == [[0, 1, 2], [3, 4]]
    assert [seeds(batch, batch.paths.plain) for batch in batches] == [[1], [3]]
    assert [batch.logprob_rows.tolist() for batch in batches] == [[], [1]]
    assert batches[0].logprobs == batches[1].logprobs == (None, None, None, None, 1)
    assert batches[0].slots.tolist() == batches[1].slots.tolist() == [0, 1, 2, 3, 4]
