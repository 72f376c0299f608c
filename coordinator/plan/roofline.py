"""How long a stage takes for a micro-batch at least: bytes over bandwidth or FLOP over rate, and what ranks exchange.

Pure, for the planner. A roofline (Williams et al. 2009): each kind of work takes as long as the slower of reading its
bytes and computing its products, and kinds follow each other. Launches, small kernels and idle hosts are not in it: no
engine is faster, and a good one comes near.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from coordinator.plan.census import Census, Numbers
from coordinator.plan.hardware import Machines, Wire, wire
from coordinator.plan.memory import StageLoad
from parallel.degrees import Degrees


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A micro-batch of each data rank. tokens: through the layers; sampled: through the head.

    read_tokens: a row's keys and values that are read from memory; pairs: of a query and a key, for a row. decode:
    rows of experts are exchanged at a fixed shape, and not by counts.
    """

    tokens: int
    sampled: int
    rows: int
    read_tokens: float
    pairs: float
    decode: bool

    def windowed(self, window: int | None) -> Batch:
        """What is left of reading and pairs in a layer whose tokens see a window only."""
        if window is None or self.read_tokens <= window:
            return self
        return replace(self, read_tokens=window, pairs=self.pairs * window / self.read_tokens)


@dataclass(frozen=True, slots=True)
class Slot:
    """Seconds of one micro-batch on one stage, by what takes them. weights: of attention, MLP and router."""

    weights: float = 0.0
    experts: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    exchange: float = 0.0

    @property
    def total(self) -> float:
        """All of them, one after another."""
        return self.weights + self.experts + self.attention + self.head + self.exchange


@dataclass(frozen=True, slots=True)
class Roofline:
    """The rates of a layout on its devices."""

    census: Census
    degrees: Degrees
    machines: Machines
    tensor: Wire
    stage: Wire
    edge: Wire

    def slot(self, load: StageLoad, batch: Batch) -> Slot:
        """A micro-batch on a rank of a stage."""
        size, numbers = self.census.weight_bytes, load.numbers
        routing = self.census.routing
        experts = 0.0
        if routing is not None and numbers.expert:
            rows = batch.tokens * self.degrees.data
            chosen = routing.experts_per_token / routing.experts
            touched = 1 - (1 - chosen) ** rows  # of the experts, if tokens choose at random
            read_bytes = numbers.expert * size - numbers.float8_experts * (size - 1)
            experts = self._seconds(read_bytes * touched, 2 * numbers.expert * chosen * rows)
        return Slot(
            weights=self._seconds(
                numbers.every_token * size - numbers.float8 * (size - 1), 2 * self._products(numbers) * batch.tokens
            ),
            experts=experts,
            attention=self._attention_s(load, batch),
            head=self._head_s(numbers, batch.sampled) if batch.sampled else 0.0,
            exchange=self._exchange_s(load, batch),
        )

    def way_s(self, batch: Batch) -> float:
        """From one stage to the next: the hidden states of a micro-batch."""
        return self.edge.send_s(self._hidden_bytes(batch)) if self.degrees.pipeline > 1 else 0.0

    def _head_s(self, numbers: Numbers, sampled: int) -> float:
        """The head, and where ids are predicted behind those that are drawn, the head once more."""
        once_s = self._seconds(numbers.head * self.census.weight_bytes, 2 * numbers.head * sampled)
        return once_s if self.census.config.prediction is None else 2 * once_s

    def _products(self, numbers: Numbers) -> float:
        """Of each token; where rows travel, each rank takes its own of them to what is shared beside the experts."""
        own = self.degrees.tensor if self.degrees.exchanges_rows else 1
        return numbers.every_token - numbers.shared + numbers.shared / own

    def _seconds(self, count: float, flop: float) -> float:
        return max(count / self.machines.read_bytes_s, flop / self.machines.flops(self.census.weight_bytes))

    def _attention_s(self, load: StageLoad, batch: Batch) -> float:
        """Keys and values read, or products of queries with them: those run in 16 bit whatever the weights are."""
        config, flops = self.census.config, self.machines.flops(self.census.number_bytes)
        layers = self.census.computed(load.layers)
        per_token = load.kv_bytes_per_token / len(layers)
        seconds = 0.0
        for layer in layers:
            seen = batch.windowed(config.layer(layer).window)
            read_s = seen.rows * seen.read_tokens * per_token / self.machines.read_bytes_s
            seconds += max(read_s, self.census.pair_flop(batch.decode) * load.heads * seen.rows * seen.pairs / flops)
        return seconds

    def _exchange_s(self, load: StageLoad, batch: Batch) -> float:
        """An all-reduce behind attention and behind an MLP; rows of experts go to their ranks and back."""
        layers = self.census.computed(load.layers)
        routed = sum(self.census.config.layer(layer).routing is not None for layer in layers)
        reduces = 2 * len(layers) - routed
        return reduces * self.tensor.all_reduce_s(self._hidden_bytes(batch)) + routed * self._experts_exchange_s(batch)

    def _experts_exchange_s(self, batch: Batch) -> float:
        degrees, hidden_bytes, routing = self.degrees, self._hidden_bytes(batch), self.census.routing
        if routing is None or degrees.expert == degrees.data == 1:
            return self.tensor.all_reduce_s(hidden_bytes)
        if batch.decode and degrees.data == 1:  # every rank has all rows, and partial sums are added
            return self.stage.all_reduce_s(hidden_bytes)
        if batch.decode:  # every rank gets all rows, and partial sums go back
            there_and_back = 2 * self.stage.gather_s(degrees.data * hidden_bytes)
        else:  # each tensor rank sends its share of the rows to the ranks of the experts that they chose
            copies = min(routing.experts_per_token, degrees.expert) * degrees.expert_tensor
            there_and_back = 2 * self.stage.all_to_all_s(hidden_bytes / degrees.tensor * copies)
        return there_and_back + self.tensor.gather_s(hidden_bytes)

    def _hidden_bytes(self, batch: Batch) -> int:
        return batch.tokens * self.census.config.hidden_size * self.census.number_bytes


def roofline(census: Census, degrees: Degrees, machines: Machines) -> Roofline:
    """The wires of a layout: ranks are numbered replica by replica, stage by stage, in a stage tensor ranks last."""
    sizes = (degrees.tensor, degrees.stage_ranks, degrees.replica_ranks)  # the last: tokens return to the first stage
    tensor, stage, edge = (wire(machines, size, machines.spans_nodes(size, degrees.ranks)) for size in sizes)
    return Roofline(census, degrees, machines, tensor, stage, edge)
