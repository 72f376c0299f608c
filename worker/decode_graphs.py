"""Decode steps as CUDA graphs: a stage's layers, collectives included, in one launch, for some numbers of rows.

In every rank's runner, which asks for each step whether there is a graph. Captured once an epoch, before it serves or,
where it must serve soon, between its steps (`later_graphs.py`); in one pool of memory that all share, as they never run
side by side, so the largest comes first. A graph reads slots and positions from a buffer that each
step fills by one copy, and all else where it lies. Rows that are missing are padding: of a slot that no request has,
whose block nobody reads, and which want no expert. The last stage's ends with logits and the greedy ids of its rows;
whoever draws otherwise takes the logits. What a model predicts behind the ids that were drawn is a second graph.
"""

from __future__ import annotations

import functools
import threading
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from echelon.errors import ConfigError
from models.batch import ForwardBatch
from models.decoder import DecoderModel
from parallel import kernels
from parallel.comm import Group, of_peer
from parallel.context import ParallelContext
from parallel.expert import ExpertStep
from worker.batch import DecodeRows
from worker.cuda_capture import Capture, Captured
from worker.kv_cache import KVCache
from worker.last_stage import LastStage
from worker.pending import ID, SCORES
from worker.plan import NO_SAMPLE, PlanTables
from worker.slots import SlotState

_FEW = (1, 2, 4)
_STRIDES = ((64, 8), (256, 16))  # up to so many rows, a graph every so many; beyond, every _LAST_STRIDE
_LAST_STRIDE = 32


def graph_sizes(most_rows: int) -> tuple[int, ...]:
    """Numbers of rows that get a graph, ascending: close together where padding would cost most; most_rows the last."""
    sizes = list(_FEW)
    for end, stride in _STRIDES:
        sizes += range(sizes[-1] // stride * stride + stride, end + 1, stride)
    sizes += range(sizes[-1] + _LAST_STRIDE, most_rows, _LAST_STRIDE)
    return (*(size for size in sizes if size < most_rows), most_rows)


def refusal(wanted: bool, device: torch.device, dtype: torch.dtype) -> str:
    """Why decode steps of an epoch are launched one kernel at a time; empty if they are captured."""
    if not wanted:
        return "cuda-graphs is off"
    if device.type != "cuda":
        return f"the device is {device.type}"
    if not kernels.can_run(device):
        return "no kernel runs on the device"
    if dtype not in kernels.DTYPES:
        return f"there are no kernels for {str(dtype).removeprefix('torch.')}"
    return ""


def agreed(own: str, replica: Group) -> str:
    """The reason of this rank, or that another one has some: graphs hold collectives, so all ranks have them or none.
    Every rank of the replica must call it."""
    refused = replica.all_gather(torch.tensor([int(bool(own))], dtype=torch.int64))
    return own or ("another rank of the replica can capture none" if refused.any() else "")


def failed(rows: int, error: RuntimeError) -> ConfigError:
    """What is raised where a capture ends in an error that is not of a peer: it comes with the remedy."""
    return ConfigError(
        f"a decode step of {rows} rows could not be captured as a CUDA graph: {error}; serve with "
        "cuda-graphs=off, or lower max-running if memory ran out",
        field="cuda_graphs",
    )


def decode_rows(tables: PlanTables) -> int:
    """Rows of the busiest data rank, if all rows of every data rank decode and are sampled; else 0.

    The same on all ranks of a replica, which must replay the same graph: their collectives meet inside.
    """
    if tables.lanes:
        alone = all(lane.decodes and len(lane.wanted) == lane.tokens for lane in tables.lanes)
        return max(lane.tokens for lane in tables.lanes) if alone else 0
    alone = bool(((tables.rows[:, 3] < 0) & (tables.rows[:, 4] != NO_SAMPLE)).all())
    return len(tables.rows) if alone else 0


class DecodeGraphs:
    """Of one stage's model over one cache, which is padded, and the slots' state, whose last slot no request has.

    Every rank of the replica must capture the same sizes, in this order, and replay the same ones.
    """

    def __init__(
        self,
        model: DecoderModel,
        kv_cache: KVCache,
        state: SlotState,
        context: ParallelContext,
        last: LastStage | None = None,
    ) -> None:
        """last: on the last stage, what comes behind its layers."""
        assert kv_cache.padding_block is not None, "rows that pad need a block"
        self._model = model
        self._kv_cache = kv_cache
        self._state = state
        self._context = context
        self._last = last
        self._ended: Ended | None = None  # of the last graph that was captured; all that have room in it share it
        self._graphs: dict[int, Graph] = {}
        self._sizes: list[int] = []
        self._closing = threading.Lock()
        self._closed = False
        state.block_tables[state.padding_slot] = kv_cache.padding_block

    @torch.inference_mode()
    def capture(self, capture: Capture, sizes: Sequence[int]) -> None:
        """Raises ConfigError where the device refuses."""
        for rows in sorted(sizes, reverse=True):
            try:
                self.add(rows, self.captured(capture, rows))
            except RuntimeError as error:  # what torch raises for all that goes wrong on a device
                if of_peer(error):
                    raise
                raise failed(rows, error) from error

    @torch.inference_mode()
    def captured(self, capture: Capture, rows: int) -> Graph:
        """Of so many rows; no step uses it yet. Raises what capture does."""
        inputs, hidden = self._buffers(rows)
        ended = self._end_buffers(rows)
        layers = capture(functools.partial(self.compute, inputs, hidden, ended))
        if self._model.prediction is None:
            return Graph(inputs, hidden, ended, layers)
        try:
            prediction = capture(functools.partial(self.compute_drafts, inputs, layers.made))
        except RuntimeError:
            layers.reset()
            raise
        return Graph(inputs, hidden, ended, layers, prediction)

    def add(self, rows: int, graph: Graph) -> None:
        """From now on it computes steps, unless all graphs have been let go of meanwhile: then it is too."""
        with self._closing:
            self._graphs[rows] = graph
            self._sizes = sorted(self._graphs)
            if self._closed:
                graph.reset()

    def rows_for(self, tables: PlanTables) -> int:
        """Rows of the graph that computes a plan's step; 0 if none does."""
        rows = decode_rows(tables)
        place = bisect_left(self._sizes, rows)
        return self._sizes[place] if rows and place < len(self._sizes) else 0

    def replay(self, rows: DecodeRows, hidden: Tensor | None) -> Tensor:
        """As DecoderModel computes it: [rows, hidden]. hidden: what the stage before has made of these rows. On the
        last stage their logits and greedy ids are then in `ended`, and these in the history.

        The next replay overwrites it, unless it goes to another stage.
        """
        graph = self._graphs[rows.inputs.shape[1]]
        graph.inputs.copy_(rows.inputs, non_blocking=True)
        if graph.hidden is not None:
            assert hidden is not None, "a stage behind the first computes on what the one before sent"
            graph.hidden[: rows.tokens].copy_(hidden)
        made = graph.layers.replay()[: rows.tokens]
        return made.clone() if self._model.norm is None else made

    def ended(self, rows: DecodeRows) -> Ended:
        """On the last stage, how the replay of these rows has ended; the next one overwrites it."""
        ended = self._graphs[rows.inputs.shape[1]].ended
        assert ended is not None, "the last stage has a head"
        return Ended(*(each[: rows.tokens] for each in ended))

    def predict(self, rows: DecodeRows) -> Tensor:
        """As DecoderModel predicts behind the rows of the last replay, whose ids have been drawn: [rows, hidden]."""
        prediction = self._graphs[rows.inputs.shape[1]].prediction
        assert prediction is not None, "the model predicts"
        return prediction.replay()[: rows.tokens]

    def reset(self) -> None:
        """Must come before their groups are closed, which else wait for graphs that hold their collectives.

        May be called from another thread: what is captured meanwhile is let go of as soon as it is.
        """
        with self._closing:
            self._closed = True
            for graph in self._graphs.values():
                graph.reset()

    def compute(self, inputs: Tensor, hidden: Tensor | None, ended: Ended | None = None) -> Tensor:
        """What a graph holds: nothing here may wait for the device, or depend on what a buffer says.

        inputs as in DecodeRows, hidden [rows, hidden]. ended: filled, if it is given, of so many rows.
        """
        made = self._model(self._batch(inputs), self._kv_cache, hidden)
        if ended is not None and self._last is not None:
            slots, positions = inputs
            part = self._model.part_logits(made)
            ended.part.copy_(part)
            ended.greedy.copy_(self._last.greedy(part))
            self._state.write(slots, positions + 1, ended.greedy[:, ID])
        return made

    def compute_drafts(self, inputs: Tensor, hidden: Tensor) -> Tensor:
        """The same of a second graph, behind the ids that were drawn from the first: hidden is what that made."""
        slots, positions = inputs
        next_ids = self._state.history[slots, positions + 1].long()
        return self._model.predict(self._batch(inputs), self._kv_cache, hidden, next_ids)

    def _batch(self, inputs: Tensor) -> ForwardBatch:
        state, (slots, positions) = self._state, inputs
        blocks = state.block_tables[slots, positions // state.block_tokens]
        return ForwardBatch(
            token_ids=state.history[slots, positions].long(),
            positions=positions,
            slot_mapping=blocks * state.block_tokens + positions % state.block_tokens,
            num_decode_rows=len(slots),
            decode_block_tables=state.block_tables[slots],
            decode_context_lens=positions + 1,
            prefill=(),
            sample_index=torch.arange(len(slots), device=slots.device),
            experts=ExpertStep(
                True, (len(slots),) * self._context.place.degrees.data, padding=slots == state.padding_slot
            ),
        )

    def _buffers(self, rows: int) -> tuple[Tensor, Tensor | None]:
        """Of a graph: its inputs, all padding; and hidden states, where a stage before makes them."""
        inputs = torch.zeros(2, rows, dtype=torch.int64, device=self._context.device)
        inputs[0] = self._state.padding_slot
        if self._model.embedding is not None:
            return inputs, None
        shape = rows, self._model.config.hidden_size
        return inputs, torch.zeros(shape, dtype=self._context.dtype, device=self._context.device)

    def _end_buffers(self, rows: int) -> Ended | None:
        """Of a graph. Logits are what takes memory, so all sizes have theirs in one place, which no pool holds."""
        head, device = self._model.head, self._context.device
        if head is None or self._last is None:
            return None
        if self._ended is None or len(self._ended.part) < rows:
            part = torch.empty(rows, len(head.weight), dtype=self._context.dtype, device=device)
            self._ended = Ended(part, torch.empty(rows, SCORES, dtype=torch.float64, device=device))
        return Ended(*(each[:rows] for each in self._ended))


class Ended(NamedTuple):
    """What a graph of the last stage leaves. part [rows, rows of the head held]: logits. greedy [rows, 2]: outcome."""

    part: Tensor
    greedy: Tensor


class Graph(NamedTuple):
    """Of some number of rows, the buffers that it reads, and where it leaves its end. prediction: the second one."""

    inputs: Tensor
    hidden: Tensor | None
    ended: Ended | None
    layers: Captured
    prediction: Captured | None = None

    def reset(self) -> None:
        self.layers.reset()
        if self.prediction is not None:
            self.prediction.reset()
