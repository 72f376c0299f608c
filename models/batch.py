"""ForwardBatch: one step's rows as tensors, ready for a model's forward pass.

Built by the runner in each rank's process, read by the models. Decode rows come first: token index i < D belongs to
decode row i. It knows nothing of requests, sampling or plans; every length that shapes a kernel is a Python integer
or a tensor's shape, so that a forward pass never waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from parallel.expert import PREFILL, ExpertStep


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """Consecutive prompt tokens of one request: batch tokens offset .. offset + tokens - 1.

    context_len counts every token of the request up to the last of these; block_table [ceil(context_len /
    block_tokens) or more] int64 names the blocks that hold them.
    """

    offset: int
    tokens: int
    context_len: int
    block_table: Tensor


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """T tokens, of which the first D are decode rows of one token each, then the prefill rows' tokens.

    Decode rows may be of one request, at positions that follow each other (drafts, which are verified together): keys
    and values of all tokens are stored before any are read.

    token_ids, positions, slot_mapping: [T] int64; a slot is block * block_tokens + offset in the block.
    decode_block_tables: [D, W] int64, padded with 0.   decode_context_lens: [D] int64, the new token included.
    sample_index: [S] int64, the tokens after which a next one is drawn.   experts: how rows travel to experts.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    num_decode_rows: int
    decode_block_tables: Tensor
    decode_context_lens: Tensor
    prefill: tuple[PrefillRow, ...]
    sample_index: Tensor
    experts: ExpertStep = PREFILL

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.positions)
