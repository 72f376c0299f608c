"""What benchmarks/kernels.py measures: sizes of published models, and odd ones that are checked alone.

Each problem has sets of inputs of its own, enough that the next one is in no cache when it is read. Random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention_rule import AttentionRule
from models.batch import ForwardBatch
from models.decode_attention import GatheredDecode
from models.layers import RMSNorm, Rotation
from models.moe import Experts
from parallel.expert import Copies
from parallel.float8 import meant
from parallel.largest import plain

BLOCK_TOKENS = 16
UNCACHED_BYTES, MOST_SETS = 400e6, 16

Choice = dict[str, Any]  # arguments of a kernel; none: as it is served


@dataclass(frozen=True, slots=True)
class Problem:
    """kernel and today, which it replaces, take the number of a set; exact is of set 0, in float64.

    reads_bytes: what must be read for one set at least. choices: what is tried besides what is served. flop: of its
    products, if they may take longer than reading.
    """

    name: str
    reads_bytes: int
    sets: int
    kernel: Callable[..., Tensor]
    today: Callable[[int], Tensor]
    exact: Callable[[], Tensor]
    choices: Sequence[Choice] = ()
    flop: int = 0


@dataclass(frozen=True, slots=True)
class Heads:
    """latent: values are the first numbers of keys."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    latent: bool = False


QWEN3_8B = Heads(32, 8, 128, 128)
V2_LITE = Heads(16, 1, 576, 512, latent=True)
V3 = Heads(128, 1, 576, 512, latent=True)
PLAIN = AttentionRule(None, 0.08, None)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a mixture of experts."""

    hidden: int
    neurons: int
    slots: int
    chosen: int


V2_LITE_EXPERTS = Sizes(2048, 1408, 64, 6)
QWEN3_EXPERTS = Sizes(2048, 768, 128, 8)


def sets_of(reads_bytes: int) -> int:
    return int(min(MOST_SETS, max(2, -(-UNCACHED_BYTES // reads_bytes))))


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes problems on a device. divided: sizes are divided by it, for a machine that is to try the script alone.

    processors: of the device, by which contexts are cut.
    """

    device: torch.device
    dtype: torch.dtype
    divided: int = 1
    processors: int = 132
    layers: dict[Sizes, list[Experts]] = field(default_factory=dict)

    def attention(
        self,
        name: str,
        contexts: Sequence[int],
        heads: Heads,
        rule: AttentionRule = PLAIN,
        choices: Sequence[Choice] = (),
    ) -> Problem:
        """Rows that have stored so many tokens, in blocks that lie scattered."""
        from models.kernels.paged_decode import PagedDecode

        lengths = torch.tensor(contexts, device=self.device)
        rows, width = len(contexts), -(-max(contexts) // BLOCK_TOKENS)
        per_token = heads.kv_heads * (heads.key_dim + (0 if heads.latent else heads.value_dim)) * self.dtype.itemsize
        read = sum(min(stored, rule.window or stored) for stored in contexts) * per_token
        sets = sets_of(read)

        def cache(dim: int) -> Tensor:
            return self.random(rows * width, BLOCK_TOKENS, heads.kv_heads, dim)

        def one() -> tuple[Tensor, Tensor, Tensor, Tensor]:
            keys = cache(heads.key_dim)
            values = keys[..., : heads.value_dim] if heads.latent else cache(heads.value_dim)
            tables = torch.randperm(rows * width, device=self.device).view(rows, width)
            return self.random(rows, heads.heads, heads.key_dim), keys, values, tables

        inputs = [one() for _ in range(sets)]

        def today(index: int, wide: bool = False) -> Tensor:
            query, keys, values, tables = inputs[index]
            batch = ForwardBatch(query, query, query, rows, tables, lengths, (), query)
            if wide:
                query, keys = query.double(), keys.double()
                values = keys[..., : heads.value_dim] if heads.latent else values.double()
            return GatheredDecode(batch, BLOCK_TOKENS, {rule.window})(rule, query, keys, values)

        def kernel(index: int, **choice: Any) -> Tensor:
            query, keys, values, tables = inputs[index]
            cut = {"processors": self.processors} | choice
            return PagedDecode(tables, lengths, **cut)(rule, query, keys, values)

        return Problem(name, read, sets, kernel, today, lambda: today(0, wide=True), choices)

    def experts(
        self, name: str, rows: int, sizes: Sizes, elsewhere: int = 0, choices: Sequence[Choice] = ()
    ) -> Problem:
        """elsewhere: so many experts are held by other ranks."""
        from models.kernels.few_rows import experts_of_few_rows

        layers = self.layers_of(sizes)

        def choice_of_rows() -> Copies:
            scores = torch.rand(rows, sizes.slots + elsewhere, device=self.device)
            shares, ids = scores.softmax(-1).topk(sizes.chosen, dim=-1)
            return Copies.of_own(ids, shares, sizes.slots, None) if elsewhere else Copies.of(ids, shares, sizes.slots)

        sets = 2 * MOST_SETS if rows == 1 else 4  # other experts in each, and other weights in every second
        inputs = [(self.random(rows, sizes.hidden), choice_of_rows()) for _ in range(sets)]
        touched = sum(int((copies.ends.diff(prepend=copies.ends.new_zeros(1)) > 0).sum()) for _, copies in inputs)

        def today(index: int) -> Tensor:
            (x, copies), layer = inputs[index], layers[index % len(layers)]
            return copies.sums(layer.outputs(copies.taken(x), copies.ends))

        def exact() -> Tensor:
            (x, copies), layer = inputs[0], layers[0]
            gate_up, down = (meant(matrix, self.dtype).double() for matrix in (layer.gate_up, layer.down))
            wide = Experts(gate_up, down, F.silu)
            return copies.sums(wide.outputs(copies.taken(x.double()), copies.ends))

        def kernel(index: int, **choice: Any) -> Tensor:
            (x, copies), layer = inputs[index], layers[index % len(layers)]
            gate_up, down = (meant(matrix, x.dtype) for matrix in (layer.gate_up, layer.down))
            return experts_of_few_rows(x, gate_up, down, copies, **choice)

        read = touched * 3 * sizes.hidden * sizes.neurons * self.dtype.itemsize // sets
        return Problem(name, read, sets, kernel, today, exact, choices)

    def layers_of(self, sizes: Sizes) -> list[Experts]:
        """Two of them, kept while they are asked for."""
        if sizes not in self.layers:
            self.layers.clear()
            self.layers[sizes] = [self.layer(sizes) for _ in range(2)]
        return self.layers[sizes]

    def layer(self, sizes: Sizes) -> Experts:
        """Random weights, scaled as a model's are."""
        gate_up = self.random(sizes.slots, 2 * sizes.neurons, sizes.hidden).mul_(sizes.hidden**-0.5)
        down = self.random(sizes.slots, sizes.hidden, sizes.neurons).mul_(sizes.neurons**-0.5)
        return Experts(gate_up, down, F.silu)

    def sorting(self, name: str, rows: int, chosen: int, slots: int) -> Problem:
        """Which choices each slot serves, as a dispatcher asks it."""
        from parallel.kernels.by_slot import by_slot

        ids = torch.rand(rows, slots, device=self.device).topk(chosen, dim=-1)[1]

        def kernel(index: int) -> Tensor:
            order, ends = by_slot(ids, slots)
            return torch.cat((order, ends))

        def today(index: int) -> Tensor:
            found, order = ids.flatten().sort(stable=True)
            every = torch.arange(slots, device=self.device)
            return torch.cat((order, torch.searchsorted(found, every, right=True, out_int32=True)))

        return Problem(name, ids.nbytes, 1, kernel, today, lambda: today(0).double())

    def largest(self, name: str, rows: int, vocabulary: int) -> Problem:
        """What a greedy draw needs of these logits."""
        from parallel.kernels.largest import largest

        logits = [self.random(rows, vocabulary) for _ in range(MOST_SETS if rows == 1 else 2)]

        def kernel(index: int, **choice: Any) -> Tensor:
            return largest(logits[index], 0, vocabulary, **choice)

        def today(index: int) -> Tensor:
            return plain(logits[index], 0, vocabulary)

        tried = [{"piece": piece, "warps": warps} for piece in (2048, 4096, 8192) for warps in (4, 8)]
        exact = partial(today, 0)
        return Problem(name, logits[0].nbytes, len(logits), kernel, today, exact, tried)

    def norm(self, name: str, *shape: int, part: bool = False) -> Problem:
        """Of rows, or of heads. part: they lie in wider rows, and begin anywhere there."""
        x, layer = self.random(*shape), RMSNorm(self.random(shape[-1]), 1e-6, False)
        if part:
            x = self.random(shape[0], shape[1] + 2, shape[2] + 3)[:, 1:-1, 3:]
        wide = RMSNorm(layer.weight.double(), 1e-6, False)
        return Problem(
            name, x.nbytes, 1, lambda index: layer(x), lambda index: layer.plain(x), lambda: wide.plain(x.double())
        )

    def rotation(self, name: str, rows: int, heads: int, dim: int, interleaved: bool) -> Problem:
        """Of all heads' numbers."""
        x, angles = self.random(rows, heads, dim), 6 * torch.rand(rows, 1, dim, device=self.device)
        turn = Rotation(angles.cos().to(self.dtype), angles.sin().to(self.dtype), interleaved)
        wide = Rotation(turn.cos.double(), turn.sin.double(), interleaved)
        return Problem(
            name, x.nbytes, 1, lambda index: turn(x), lambda index: turn.plain(x), lambda: wide.plain(x.double())
        )

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)
