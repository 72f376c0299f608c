"""KVCache: the paged keys and values of one rank, allocated once per epoch.

Blocks are handed out by the leader's block pool; here they are only memory, addressed by block tables. It starts
zeroed, so that slots never written hold finite numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from echelon.errors import ConfigError
from models.config import ModelConfig
from models.tables import cached_layers, kv_bytes_per_block, kv_heads_held
from parallel.context import ParallelContext


class KVCache:
    """keys and values of each of the rank's layers: [num_blocks, block_tokens, key/value heads held, head_dim].

    With latent attention keys begin with the values, and there are no others. padded: one block more, behind the
    others, which belongs to no request: rows that only fill a CUDA graph write there.
    """

    def __init__(
        self, config: ModelConfig, context: ParallelContext, num_blocks: int, block_tokens: int, padded: bool = False
    ) -> None:
        assert num_blocks >= 1 and block_tokens >= 1, f"{num_blocks} blocks of {block_tokens} tokens"
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        heads = kv_heads_held(config, context.place.degrees.tensor)
        self.padding_block = num_blocks if padded else None
        shape = (num_blocks + padded, block_tokens, heads, config.key_dim)

        def allocate() -> tuple[Tensor, ...]:
            layers = cached_layers(config, context.place)
            return tuple(torch.zeros(shape, device=context.device, dtype=context.dtype) for _ in layers)

        try:
            self.keys, self.values = allocate(), () if config.latent is not None else allocate()
        except RuntimeError as error:  # what torch raises when memory runs out, on CPU and on CUDA
            block_bytes = kv_bytes_per_block(config, context.place, block_tokens, context.dtype.itemsize)
            raise ConfigError(
                f"no memory for {num_blocks} key/value blocks of {block_bytes} bytes, "
                f"{num_blocks * block_bytes} bytes in all, on {context.device}; lower max-context or max-running"
            ) from error

    @property
    def resident_bytes(self) -> int:
        """Bytes of all layers' keys and values, of which every block is for requests: without the padding."""
        return sum(tensor[: self.num_blocks].nbytes for tensor in (*self.keys, *self.values))
