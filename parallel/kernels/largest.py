"""The largest logit of each row and its id, and whether all are finite, in one pass over the logits.

In rank processes, on CUDA. A program reads a piece of a row, a second launch joins the pieces of each row: as many
programs as keep the memory busy for one row, too. The reference is parallel/largest.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 4096  # logits that a program reads at once


def largest(logits: Tensor, first_id: int, width: int, piece: int = PIECE, warps: int = 8) -> Tensor:
    """As parallel.largest has it: logits [S, V], whose rows lie whole -> [S, 2] float64."""
    rows, pieces = logits.shape[0], max(1, triton.cdiv(width, piece))
    found = torch.empty(rows, 2, dtype=torch.float64, device=logits.device)
    if rows:
        values = torch.empty(rows, pieces, dtype=torch.float32, device=logits.device)
        ids = torch.empty(rows, pieces, dtype=torch.int32, device=logits.device)
        _of_piece[pieces, rows](logits, values, ids, logits.stride(0), first_id, width, piece, num_warps=warps)
        _of_row[(rows,)](values, ids, found, pieces, triton.next_power_of_2(pieces), num_warps=1)
    return found


@triton.jit
def _of_piece(logits, values, ids, stride, first_id, width, PIECE: tl.constexpr):
    """One that is not finite counts as infinity with the id -2, so that it wins."""
    piece, row = tl.program_id(0), tl.program_id(1)
    place = piece * PIECE + tl.arange(0, PIECE)
    counts = place < width
    found = tl.load(logits + row.to(tl.int64) * stride + place, mask=counts, other=-float("inf")).to(tl.float32)
    spoilt = tl.max((counts & ~(tl.abs(found) < float("inf"))).to(tl.int32), 0) > 0
    most = tl.max(found, 0)
    lowest = tl.min(tl.where(found == most, place, 2147483647 - first_id), 0)
    tl.store(values + row * tl.num_programs(0) + piece, tl.where(spoilt, float("inf"), most))
    tl.store(ids + row * tl.num_programs(0) + piece, tl.where(spoilt, -2, lowest + first_id))


@triton.jit
def _of_row(values, ids, found, pieces, PIECES: tl.constexpr):
    row, piece = tl.program_id(0), tl.arange(0, PIECES)
    value = tl.load(values + row * pieces + piece, mask=piece < pieces, other=-float("inf"))
    most = tl.max(value, 0)
    held = tl.load(ids + row * pieces + piece, mask=piece < pieces, other=2147483647)
    tl.store(found + 2 * row, most.to(tl.float64))
    tl.store(found + 2 * row + 1, tl.min(tl.where(value == most, held, 2147483647), 0).to(tl.float64))
