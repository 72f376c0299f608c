"""From a plan's tables and the slots' state to one step's tensors.

Runs in each rank's runner. What shapes a kernel is computed on the host from the plan alone; what a step leaves
for the next (last ids, block tables, sampling) stays on the device and is never read back. A step copies its
tables to the device once. It must not know the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.batch import ForwardBatch, PrefillRow
from worker.plan import NO_LOGPROBS, NO_SAMPLE, Int32Array, PlanTables
from worker.sampler import SamplingPaths, SamplingRows

Int64Array = npt.NDArray[np.int64]

_GREEDY, _PLAIN, _TRUNCATED = 0, 1, 2
_SAMPLING_COLUMNS = 5  # choice, seed, temperature and top_p as float64 bits, top_k


class SlotState:
    """What a step leaves for the next, by slot: on the device, plus the host's note of each slot's sampling path."""

    def __init__(self, max_running: int, blocks_per_slot: int, device: torch.device) -> None:
        self.last_ids = torch.zeros(max_running, dtype=torch.int64, device=device)
        self.block_tables = torch.zeros(max_running, blocks_per_slot, dtype=torch.int64, device=device)
        self.sampling = torch.zeros(max_running, _SAMPLING_COLUMNS, dtype=torch.int64, device=device)
        self.paths = np.full(max_running, _GREEDY, dtype=np.int8)

    def sampling_rows(self, slots: Tensor, positions: Tensor) -> SamplingRows:
        """The sampling of these slots, for the ids at these positions."""
        choice, seed, temperature, top_p, top_k = self.sampling[slots].unbind(dim=1)
        return SamplingRows(
            temperature=temperature.view(torch.float64),
            top_p=top_p.view(torch.float64),
            top_k=top_k,
            seed=seed,
            choice=choice,
            position=positions,
        )


@dataclass(frozen=True, slots=True)
class Share:
    """The sampled rows whose logits this rank holds: rows start .. start + size - 1 of `padded` over all ranks."""

    start: int
    size: int
    padded: int

    @classmethod
    def of(cls, sampled: int, rank: int, ranks: int) -> Share:
        per_rank = -(-sampled // ranks)
        start = min(rank * per_rank, sampled)
        return cls(start, min(per_rank, sampled - start), per_rank * ranks)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step on the device. share, sampling, paths and logprob_rows are of this rank's share of the sampled rows.

    slots [S]: where the sampled ids go. logprobs: for every sampled row, None or how many alternatives were asked.
    """

    forward: ForwardBatch
    slots: Tensor
    share: Share
    sampling: SamplingRows
    paths: SamplingPaths
    logprob_rows: Tensor
    logprobs: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class _Layout:
    """A plan's rows on the host: T tokens, S sampled rows. wanted [S]: the last column of the plan's rows."""

    decode_rows: int
    token_slots: Int64Array
    positions: Int64Array
    given: Int64Array
    sample_index: Int64Array
    sample_slots: Int64Array
    sample_positions: Int64Array
    wanted: Int64Array


def apply_and_build(tables: PlanTables, state: SlotState, block_tokens: int, rank: int, ranks: int) -> StepBatch:
    """Apply a plan's admits and block changes to the state, then lay out its rows: one copy to the device in all."""
    layout = _layout(tables)
    share = Share.of(len(layout.sample_index), rank, ranks)
    mine = slice(share.start, share.start + share.size)
    admits = _admit_columns(tables.admits)
    admit_slots = tables.admits[:, 0].astype(np.int64)
    assert len(np.unique(admit_slots)) == len(admit_slots), "a slot is admitted twice in one plan"
    state.paths[admit_slots] = _paths(admits)
    paths = state.paths[layout.sample_slots[mine]]
    admit_slots_, admits_, blocks, token_slots, positions, given, *sampled, plain, truncated, logprob_rows = _upload(
        (
            admit_slots,
            admits,
            tables.blocks.astype(np.int64),
            layout.token_slots,
            layout.positions,
            layout.given,
            layout.sample_index,
            layout.sample_slots,
            layout.sample_positions,
            np.flatnonzero(paths == _PLAIN),
            np.flatnonzero(paths == _TRUNCATED),
            np.flatnonzero(layout.wanted[mine] >= 0),
        ),
        state.last_ids.device,
    )
    state.sampling[admit_slots_] = admits_
    state.block_tables[blocks[:, 0], blocks[:, 1]] = blocks[:, 2]
    sample_index, sample_slots, sample_positions = sampled
    return StepBatch(
        forward=_forward(tables.rows, layout, state, block_tokens, (token_slots, positions, given, sample_index)),
        slots=sample_slots,
        share=share,
        sampling=state.sampling_rows(sample_slots[mine], sample_positions[mine]),
        paths=SamplingPaths(plain, truncated),
        logprob_rows=logprob_rows,
        logprobs=tuple(None if wanted == NO_LOGPROBS else int(wanted) for wanted in layout.wanted),
    )


def _layout(tables: PlanTables) -> _Layout:
    slot, first, tokens, offset, wanted = tables.rows.astype(np.int64).T
    decode = offset < 0
    decode_rows = int(decode.sum())
    assert decode[:decode_rows].all(), "decode rows come first"
    assert (tokens[:decode_rows] == 1).all(), "a decode row has one token"
    starts = tokens.cumsum() - tokens
    given = [tables.token_ids[begin : begin + count] for begin, count in zip(offset, tokens, strict=True) if begin >= 0]
    sampled = wanted != NO_SAMPLE
    return _Layout(
        decode_rows=decode_rows,
        token_slots=slot.repeat(tokens),
        positions=np.arange(tokens.sum()) + (first - starts).repeat(tokens),
        given=np.concatenate(given).astype(np.int64) if given else np.empty(0, np.int64),
        sample_index=(starts + tokens - 1)[sampled],
        sample_slots=slot[sampled],
        sample_positions=(first + tokens)[sampled],
        wanted=wanted[sampled],
    )


def _forward(
    rows: Int32Array,
    layout: _Layout,
    state: SlotState,
    block_tokens: int,
    device: tuple[Tensor, Tensor, Tensor, Tensor],
) -> ForwardBatch:
    """device: token_slots, positions, given and sample_index of the layout, as tensors."""
    token_slots, positions, given, sample_index = device
    count = layout.decode_rows
    decode_slots, context_lens = token_slots[:count], positions[:count] + 1
    blocks = state.block_tables[token_slots, positions // block_tokens]
    width = -(-int(layout.positions[:count].max(initial=-1) + 1) // block_tokens)
    used = torch.arange(width, device=positions.device) * block_tokens < context_lens[:, None]
    prefill, offset = [], count
    for slot, first, tokens in rows[count:, :3].tolist():
        end = first + tokens
        prefill.append(PrefillRow(offset, tokens, end, state.block_tables[slot, : -(-end // block_tokens)]))
        offset += tokens
    return ForwardBatch(
        token_ids=torch.cat([state.last_ids[decode_slots], given]),
        positions=positions,
        slot_mapping=blocks * block_tokens + positions % block_tokens,
        num_decode_rows=count,
        decode_block_tables=torch.where(used, state.block_tables[decode_slots, :width], 0),
        decode_context_lens=context_lens,
        prefill=tuple(prefill),
        sample_index=sample_index,
    )


def _admit_columns(admits: Int32Array) -> Int64Array:
    """[admits, _SAMPLING_COLUMNS] of the plan's admits; the floats keep their bits, widened to float64."""
    columns = np.empty((len(admits), _SAMPLING_COLUMNS), dtype=np.int64)
    columns[:, 0] = admits[:, 1]
    columns[:, 1] = np.ascontiguousarray(admits[:, 2:4]).view("<i8")[:, 0]
    columns[:, 2:4] = np.ascontiguousarray(admits[:, 4:6]).view("<f4").astype(np.float64).view(np.int64)
    columns[:, 4] = admits[:, 6]
    return columns


def _paths(admits: Int64Array) -> npt.NDArray[np.int8]:
    """Which path the sampling columns ask for."""
    temperature, top_p = np.ascontiguousarray(admits[:, 2:4]).view(np.float64).T
    truncated = (top_p < 1) | (admits[:, 4] > 0)
    paths = np.where(temperature == 0, _GREEDY, np.where(truncated, _TRUNCATED, _PLAIN))
    return paths.astype(np.int8)


def _upload(arrays: Sequence[Int64Array], device: torch.device) -> list[Tensor]:
    """int64 arrays as tensors on the device, by one copy that the host does not wait for."""
    staged = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == "cuda":
        staged = staged.pin_memory()
    parts = torch.split(staged.to(device, non_blocking=True), [array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
