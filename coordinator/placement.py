"""Placement: model facts and degrees -> bytes per rank, and how many KV blocks the ranks' memory allows.

Pure, in the coordinator and in the supervisor's checks before anything is started. It reads the model's parameter
table, which the loader reads too, so planned bytes are resident bytes. It knows no Ray and no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.plan.memory import BLOCK_TOKENS
from echelon.config import CoordinatorConfig, ServeConfig
from echelon.errors import ConfigError
from models.config import DTYPE_BYTES, ModelConfig
from models.cutting import check_degrees
from models.tables import kv_bytes_per_block, parameter_bytes
from parallel.degrees import Degrees


@dataclass(frozen=True, slots=True)
class RankMemory:
    """What a rank's device had free before anything was loaded."""

    node_id: str
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPlan:
    """What one replica needs of its ranks, before any of them was started.

    parameter_bytes and block_bytes, of one KV block, by rank. shared_memory: ranks of one node, of whatever replica,
    draw on the same memory (cpu). memory_fraction is the share of the free memory that weights and blocks may take.
    kv_blocks_limit: more blocks are never held, None where memory alone limits them.
    """

    degrees: Degrees
    parameter_bytes: tuple[int, ...]
    block_bytes: tuple[int, ...]
    block_tokens: int
    max_context: int
    memory_fraction: float
    shared_memory: bool
    kv_blocks_limit: int | None = None

    @property
    def ranks(self) -> range:
        """Of a replica."""
        return range(self.degrees.replica_ranks)

    @property
    def blocks_per_request(self) -> int:
        """Blocks of one request of max_context tokens."""
        return -(-self.max_context // self.block_tokens)

    def kv_blocks(self, memory: Sequence[RankMemory]) -> int:
        """Blocks on every rank, before ranks take off what a step needs.

        All that memory allows on devices of their own: their ranks keep to the limit after that. In memory that is
        shared with everything else no step is measured, and the limit is kept here. Raises ConfigError when not even
        one request of max_context tokens fits.
        """
        assert len(memory) == len(self.ranks), f"memory of {len(memory)} ranks, the plan has {len(self.ranks)}"
        sharers = Counter(rank.node_id for rank in memory for _ in range(self.degrees.replicas))
        allowed = [
            self._room_bytes(rank, sharers[rank.node_id] if self.shared_memory else 1, index) // self.block_bytes[index]
            for index, rank in enumerate(memory)
        ]
        tightest = min(self.ranks, key=allowed.__getitem__)
        if allowed[tightest] < self.blocks_per_request:
            raise self._no_room(memory[tightest], sharers[memory[tightest].node_id], tightest, allowed[tightest])
        limited = self.shared_memory and self.kv_blocks_limit is not None
        return min(self.kv_blocks_limit or 0, allowed[tightest]) if limited else allowed[tightest]

    def _room_bytes(self, rank: RankMemory, sharers: int, index: int) -> int:
        """For KV blocks; negative where the weights alone do not fit."""
        return int(rank.free_bytes * self.memory_fraction) // sharers - self.parameter_bytes[index]

    def _no_room(self, rank: RankMemory, sharers: int, index: int, allowed: int) -> ConfigError:
        shared = f" / {sharers} ranks" if self.shared_memory and sharers > 1 else ""
        need = self.blocks_per_request
        fitting = max(allowed, 0) * self.block_tokens
        remedy = (
            f"lower max-context to {fitting} or less, raise tensor or pipeline, or free memory"
            if fitting
            else "the weights alone leave no room: raise tensor or pipeline, or free memory"
        )
        return ConfigError(
            f"no memory for the KV cache on rank {index}: {_mib(rank.free_bytes)} free * gpu-memory-fraction "
            f"{self.memory_fraction:g}{shared} - {_mib(self.parameter_bytes[index])} of weights leaves room for "
            f"{max(allowed, 0)} blocks, and one request of max-context {self.max_context} needs {need} blocks of "
            f"{self.block_tokens} tokens ({_mib(need * self.block_bytes[index])}); {remedy}",
            field="max_context",
        )


def degrees_of(config: ServeConfig) -> Degrees:
    """What the flags ask for. Raises ConfigError when that is no product."""
    return Degrees(
        replicas=config.replicas,
        pipeline=config.pipeline,
        data=config.data,
        tensor=config.tensor,
        expert=config.expert,
        redundant_experts=config.redundant_experts,
    )


def plan_replica(config: CoordinatorConfig, model: ModelConfig) -> ReplicaPlan:
    """The plan of each replica. Raises ConfigError when the degrees do not divide the model, or limits contradict."""
    degrees = degrees_of(config)
    check_degrees(model, degrees)
    dtype_bytes = DTYPE_BYTES[config.dtype]
    places = [degrees.place(rank) for rank in range(degrees.replica_ranks)]
    return ReplicaPlan(
        degrees=degrees,
        parameter_bytes=tuple(parameter_bytes(model, place, dtype_bytes) for place in places),
        block_bytes=tuple(kv_bytes_per_block(model, place, BLOCK_TOKENS, dtype_bytes) for place in places),
        block_tokens=BLOCK_TOKENS,
        max_context=config.max_context,
        memory_fraction=config.gpu_memory_fraction,
        shared_memory=config.device == "cpu",
        kv_blocks_limit=_kv_blocks_limit(config),
    )


def _kv_blocks_limit(config: CoordinatorConfig) -> int | None:
    """What was asked for; else, in memory that is shared with everything else, what a full batch can use."""
    if config.kv_cache_tokens is None:
        return config.max_running * -(-config.max_context // BLOCK_TOKENS) if config.device == "cpu" else None
    if config.kv_cache_tokens < config.max_context:
        raise ConfigError(
            f"kv-cache-tokens={config.kv_cache_tokens} is less than one request of max-context={config.max_context} "
            "tokens can need; raise it, or lower max-context",
            field="kv_cache_tokens",
        )
    return -(-config.kv_cache_tokens // BLOCK_TOKENS)


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
