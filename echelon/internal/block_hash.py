"""Chained hashes of a sequence's blocks: equal hashes mean equal beginnings.

A block's hash covers its parent's hash and its own ids, the first one's the salt (as in vLLM's automatic prefix
caching). The leader finds cached blocks by it (`worker/prefix_cache.py`), the coordinator the replica that has them
(`coordinator/requests/affinity.py`); so both must compute the same.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from hashlib import blake2b

_ID_BYTES = 4  # int32


def root_hash(salt: str) -> bytes:
    """What the first block's hash builds on: prefixes under different salts have nothing in common."""
    return blake2b(salt.encode(), digest_size=32).digest()


def chain(parent: bytes, ids: Collection[int], block_tokens: int) -> list[bytes]:
    """The hash of each full block of these ids, which follow the block with the hash `parent`."""
    content, block_bytes = struct.pack(f"<{len(ids)}i", *ids), block_tokens * _ID_BYTES
    hashes: list[bytes] = []
    for start in range(0, len(content) - block_bytes + 1, block_bytes):
        parent = blake2b(parent + content[start : start + block_bytes], digest_size=32).digest()
        hashes.append(parent)
    return hashes
