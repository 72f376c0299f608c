"""From a plan's tables and the slots' state to one step's tensors.

Runs in each rank's runner. What shapes a kernel is computed on the host from the plan alone; what a step leaves for
the next stays on the device and is never read back. A step copies its tables to the device once; rows with rules bring
small copies of their own. It must not know the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.batch import ForwardBatch, PrefillRow
from parallel.expert import ExpertStep
from worker import slot_rules
from worker.plan import NO_LOGPROBS, NO_SAMPLE, Lane, PlanTables
from worker.sampler import Path, RuledRows, SamplingPaths, SamplingRows
from worker.slots import SlotState
from worker.upload import upload

Int64Array = npt.NDArray[np.int64]

_NOTHING = torch.empty(0, dtype=torch.int64)
_NO_PATHS = SamplingPaths(_NOTHING, _NOTHING)
_RULED = -1  # stands in a row's path where rules come before it


@dataclass(frozen=True, slots=True)
class Share:
    """The rows of many that this rank holds: start .. start + size - 1; over all ranks they are padded to `padded`."""

    start: int
    size: int
    padded: int

    @classmethod
    def of(cls, rows: int, rank: int, ranks: int) -> Share:
        per_rank = -(-rows // ranks)
        start = min(rank * per_rank, rows)
        return cls(start, min(per_rank, rows - start), per_rank * ranks)

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The rows of a step that a CUDA graph computes. inputs: [2, rows of the graph] int64, their slots and positions;
    behind the first `tokens` of them, the padding slot and 0."""

    tokens: int
    inputs: Tensor


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step on the device. sampling, paths, ruled and logprob_rows are of this rank's share of the S sampled rows.

    greedy: of all these rows the likeliest id is wanted, and nothing else; the same on all ranks of a data rank. One
    that `worker/greedy_batch.py` has made has no more than such rows need, and its tensors lie on the host.

    token_slots [T]: of every token. slots and positions [S]: where the sampled ids go; sampled_slots [S]: those slots,
    on the host. logprobs: for every sampled row, None or how many alternatives were asked. forward.sample_index [S + C]
    ends with the scored tokens, targets [C] are the ids that follow them; scored: of each scored row, how many these
    are, and how many alternatives. lanes: what the other data ranks return in this step, where there are any.
    """

    forward: ForwardBatch | DecodeRows
    token_slots: Tensor
    slots: Tensor
    positions: Tensor
    sampled_slots: Int64Array
    greedy: bool
    logprobs: tuple[int | None, ...]
    lanes: tuple[Lane, ...]
    share: Share = Share(0, 0, 0)
    find_sampling: Callable[[], SamplingRows] | None = None
    paths: SamplingPaths = _NO_PATHS
    ruled: tuple[RuledRows, ...] = ()
    logprob_rows: Tensor = _NOTHING
    targets: Tensor = _NOTHING
    scored: tuple[tuple[int, int], ...] = ()

    @property
    def sampling(self) -> SamplingRows:
        """Looked up when it is asked for: greedy rows need none."""
        assert self.find_sampling is not None, "rows of a graph that are greedy"
        return self.find_sampling()


@dataclass(frozen=True, slots=True)
class _Layout:
    """A plan's rows on the host, as StepBatch has them: T tokens. wanted [S]: the last column of the plan's rows."""

    decode_rows: int
    token_slots: Int64Array
    positions: Int64Array
    given: Int64Array
    sample_index: Int64Array
    sample_slots: Int64Array
    sample_positions: Int64Array
    wanted: Int64Array
    targets: Int64Array
    scored: tuple[tuple[int, int], ...]


def apply_and_build(
    tables: PlanTables,
    state: SlotState,
    rank: int,
    ranks: int,
    piece_rows: int,
    graph_rows: int = 0,
) -> StepBatch:
    """Apply a plan's admits, block changes and ids to the state, then lay out its rows.

    piece_rows: how many rows with rules are sampled together at most; 0 where it is done on another stage, and this
    rank's share is empty. graph_rows: of the CUDA graph that computes them, if not 0.
    """
    layout = _layout(tables)
    tokens, share = len(layout.positions), Share.of(len(layout.wanted) if piece_rows else 0, rank, ranks)
    sampling = state.admit(tables)
    paths, ruled = _ruled(state, layout, share, piece_rows)
    arrays = (*_token_arrays(layout, state.padding_slot, graph_rows), *_sampling_arrays(layout, share, paths))
    admits = tables.admits["slot"].astype(np.int64), sampling, tables.blocks.astype(np.int64)
    admit_slots, admitted, blocks, *on_device = upload((*admits, *arrays), state.history.device)
    token_slots, positions, given, inputs, sample_index, *sampled = on_device
    slots, sample_positions, targets, plain, truncated, logprob_rows = sampled
    if len(admitted):
        state.sampling[admit_slots] = admitted
    if len(blocks):
        state.block_tables[blocks[:, 0], blocks[:, 1]] = blocks[:, 2]
    _write_known_ids(tables, state, layout.decode_rows, token_slots, positions, given)
    eager = token_slots, positions, given, sample_index
    return StepBatch(
        forward=DecodeRows(tokens, inputs) if graph_rows else _forward(tables, layout, state, eager),
        token_slots=token_slots,
        slots=slots,
        positions=sample_positions,
        sampled_slots=layout.sample_slots,
        share=share,
        greedy=_is_greedy(state, layout),
        find_sampling=partial(state.sampling_rows, slots[share.rows], sample_positions[share.rows]),
        paths=SamplingPaths(plain, truncated),
        ruled=ruled,
        logprob_rows=logprob_rows,
        logprobs=tuple(None if wanted == NO_LOGPROBS else wanted for wanted in layout.wanted.tolist()),
        targets=targets,
        scored=layout.scored,
        lanes=tables.lanes,
    )


def _write_known_ids(
    tables: PlanTables, state: SlotState, decode_rows: int, token_slots: Tensor, positions: Tensor, given: Tensor
) -> None:
    """Ids that a plan tells, and those of its prefill rows, into the history."""
    if len(tables.told):
        told = (*_spans(*tables.told.astype(np.int64).T), tables.told_ids.astype(np.int64))
        state.write(*upload(told, state.history.device))
    if len(given):
        state.write(token_slots[decode_rows:], positions[decode_rows:], given)


def _layout(tables: PlanTables) -> _Layout:
    slot, first, tokens, offset, wanted = tables.rows.astype(np.int64).T
    decode = offset < 0
    decode_rows = int(decode.sum())
    assert decode[:decode_rows].all(), "decode rows come first"
    assert (tokens[:decode_rows] == 1).all(), "a decode row has one token"
    starts = tokens.cumsum() - tokens
    prefill = zip(offset[decode_rows:].tolist(), tokens[decode_rows:].tolist(), strict=True)
    given = [tables.token_ids[begin : begin + count] for begin, count in prefill]
    sampled = wanted != NO_SAMPLE
    token_slots, positions = _spans(slot, first, tokens)
    score_index, targets, scored = _scored(tables, starts)
    return _Layout(
        decode_rows=decode_rows,
        token_slots=token_slots,
        positions=positions,
        given=np.concatenate(given).astype(np.int64) if given else np.empty(0, np.int64),
        sample_index=np.concatenate([(starts + tokens - 1)[sampled], *score_index]),
        sample_slots=slot[sampled],
        sample_positions=(first + tokens)[sampled],
        wanted=wanted[sampled],
        targets=np.concatenate(targets) if targets else np.empty(0, np.int64),
        scored=scored,
    )


def _token_arrays(layout: _Layout, padding_slot: int, graph_rows: int) -> tuple[Int64Array, ...]:
    """Of the model: slots, positions and given ids of tokens, DecodeRows.inputs, and which tokens are sampled."""
    inputs = _padded(layout, graph_rows, padding_slot)
    return layout.token_slots, layout.positions, layout.given, inputs, layout.sample_index


def _sampling_arrays(layout: _Layout, share: Share, paths: npt.NDArray[np.int8]) -> tuple[Int64Array, ...]:
    """As StepBatch has them: slots, positions, targets, SamplingPaths, logprob_rows."""
    drawn = np.flatnonzero(paths == Path.PLAIN), np.flatnonzero(paths == Path.TRUNCATED)
    logprob_rows = np.flatnonzero(layout.wanted[share.rows] >= 0)
    return layout.sample_slots, layout.sample_positions, layout.targets, *drawn, logprob_rows


def _padded(layout: _Layout, rows: int, padding_slot: int) -> Int64Array:
    """As DecodeRows has them; [2, 0] without a graph."""
    padded = np.zeros((2, rows), dtype=np.int64)
    padded[0] = padding_slot
    if rows:
        padded[:, : len(layout.positions)] = layout.token_slots, layout.positions
    return padded


def _spans(slot: Int64Array, first: Int64Array, tokens: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Slot and position of every token of these spans, [all tokens] each."""
    starts = tokens.cumsum() - tokens
    return slot.repeat(tokens), np.arange(tokens.sum()) + (first - starts).repeat(tokens)


def _scored(
    tables: PlanTables, starts: Int64Array
) -> tuple[list[Int64Array], list[Int64Array], tuple[tuple[int, int], ...]]:
    """For each scored row: which tokens of the batch predict, and the ids that follow them; then StepBatch.scored."""
    index, targets, scored = [], [], []
    for row, alternatives, next_id in tables.scored.tolist():
        _, _, tokens, offset, _ = tables.rows[row].tolist()
        follow = tables.token_ids[offset + 1 : offset + tokens].tolist() + ([next_id] if next_id >= 0 else [])
        index.append(starts[row] + np.arange(len(follow)))
        targets.append(np.array(follow, dtype=np.int64))
        scored.append((len(follow), alternatives))
    return index, targets, tuple(scored)


def _is_greedy(state: SlotState, layout: _Layout) -> bool:
    """As StepBatch has it."""
    slots = layout.sample_slots
    if state.paths[slots].any() or (layout.wanted != NO_LOGPROBS).any():  # the greedy path is 0
        return False
    return not slot_rules.ruled_rows(state.rules, slots, layout.sample_positions)


def _ruled(
    state: SlotState, layout: _Layout, share: Share, piece_rows: int
) -> tuple[npt.NDArray[np.int8], tuple[RuledRows, ...]]:
    """The path of each row of the share, _RULED where it stands in the second part, with its rules."""
    slots = layout.sample_slots[share.rows]
    paths = state.paths[slots]
    rows = slot_rules.ruled_rows(state.rules, slots, layout.sample_positions[share.rows])
    if not rows:
        return paths, ()
    ruled = slot_rules.build(rows, [Path(paths[row.index]) for row in rows], state.history, piece_rows)
    paths[[row.index for row in rows]] = _RULED
    return paths, ruled


def _forward(
    tables: PlanTables, layout: _Layout, state: SlotState, device: tuple[Tensor, Tensor, Tensor, Tensor]
) -> ForwardBatch:
    """device: token_slots, positions, given and sample_index of the layout, as tensors."""
    token_slots, positions, given, sample_index = device
    count, block_tokens = layout.decode_rows, state.block_tokens
    decode_slots, context_lens = token_slots[:count], positions[:count] + 1
    blocks = state.block_tables[token_slots, positions // block_tokens]
    width = -(-int(layout.positions[:count].max(initial=-1) + 1) // block_tokens)
    used = torch.arange(width, device=positions.device) * block_tokens < context_lens[:, None]
    prefill, offset = [], count
    for slot, first, tokens in tables.rows[count:, :3].tolist():
        end = first + tokens
        prefill.append(PrefillRow(offset, tokens, end, state.block_tables[slot, : -(-end // block_tokens)]))
        offset += tokens
    return ForwardBatch(
        token_ids=torch.cat([state.history[decode_slots, positions[:count]].long(), given]),
        positions=positions,
        slot_mapping=blocks * block_tokens + positions % block_tokens,
        num_decode_rows=count,
        decode_block_tables=torch.where(used, state.block_tables[decode_slots, :width], 0),
        decode_context_lens=context_lens,
        prefill=tuple(prefill),
        sample_index=sample_index,
        experts=_expert_step(tables, len(layout.positions), count),
    )


def _expert_step(tables: PlanTables, tokens: int, decode_rows: int) -> ExpertStep:
    """Where every row of every data rank decodes, the exchange has a shape that all of them know."""
    lanes = tables.lanes
    if not lanes:
        return ExpertStep(tokens == decode_rows, (tokens,))
    return ExpertStep(all(lane.decodes for lane in lanes), tuple(lane.tokens for lane in lanes))
