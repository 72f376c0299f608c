"""Where the numbers of a row that is not finite went astray: the first layer whose cached keys say so.

In ranks, and only once a step has had such a row: nothing is watched before, for the keys that a layer has cached are
made of what the layers before it have given it. A row may be spoilt by a token before its own, which it has read.
"""

from __future__ import annotations

from typing import NamedTuple

import structlog
import torch
from torch import Tensor

from worker.kv_cache import KVCache
from worker.plan import NON_FINITE
from worker.slots import SlotState

PIECE_TOKENS = 4096  # whose keys are looked at at once: steps run on, and the cache has left little memory

log = structlog.get_logger("runner")


class Sampled(NamedTuple):
    """The rows of a step that this rank's data rank sampled. outcome [S, ..]: ids first; slots, positions [S]: where
    they go."""

    outcome: Tensor
    slots: Tensor
    positions: Tensor


class Astray(NamedTuple):
    """The first layer of the rank, counted from 0, whose keys are not finite, and of which position."""

    layer: int
    position: int


@torch.inference_mode()
def tell(step: int, rows: Sampled, state: SlotState, cache: KVCache, first_layer: int) -> None:
    """Logs each row that is not finite, while its slot has no other owner. Waits for the device."""
    for row in (rows.outcome[:, 0] == NON_FINITE).nonzero().flatten().tolist():
        slot, tokens = int(rows.slots[row]), int(rows.positions[row])
        where: dict[str, object] = {"layer": f"behind the keys of layer {first_layer + len(cache.keys) - 1}"}
        try:
            found = first_astray(cache, state.block_tables[slot], tokens)
        except torch.OutOfMemoryError:  # which costs this line of the log its place, and nobody a step
            where = {"layer": "unknown: no memory is left to look"}
        else:
            if found is not None:
                where = {"layer": first_layer + found.layer, "position": found.position}
        log.warning("scores are not finite", step=step, slot=slot, tokens=tokens, **where)


def first_astray(cache: KVCache, block_table: Tensor, tokens: int) -> Astray | None:
    """block_table [blocks] of a sequence of so many tokens; None if the keys of all layers are finite."""
    pieces = block_table[: -(-tokens // cache.block_tokens)].split(max(PIECE_TOKENS // cache.block_tokens, 1))
    for layer, keys in enumerate(cache.keys):
        first = 0
        for blocks in pieces:
            finite = keys[blocks].flatten(0, 1)[: tokens - first].isfinite().flatten(1).all(-1)
            if not finite.all():
                return Astray(layer, first + int(finite.logical_not().nonzero()[0]))
            first += len(finite)
    return None
