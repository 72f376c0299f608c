"""Whether a model can be cut over so many ranks, and if not, which degrees it could be.

Pure, in the coordinator before anything is started, and in planning. Every refusal has the arithmetic and the remedy.
It knows no torch and no file.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from echelon.errors import ConfigError
from models.config import ModelConfig
from models.parameter import Parameter, splitting_ranks
from models.tables import parameter_table
from parallel.degrees import Degrees, divisors
from parallel.sharding import Split, can_split, held_regions


def check_degrees(config: ModelConfig, degrees: Degrees) -> None:
    """Raises ConfigError with the arithmetic and the remedy if the model cannot be cut over so many ranks."""
    if degrees.pipeline > config.num_hidden_layers:
        raise ConfigError(
            f"pipeline={degrees.pipeline} stages for num_hidden_layers={config.num_hidden_layers}: each stage needs a "
            f"layer; pipeline may be 1 to {config.num_hidden_layers} ({degrees})",
            field="pipeline",
        )
    problem = _tensor_problem(config, degrees.tensor, degrees.exchanges_rows)
    if problem is not None:
        heads = range(1, config.num_attention_heads + 1)
        allowed = (t for t in heads if _tensor_problem(config, t, degrees.exchanges_rows) is None)
        raise ConfigError(f"{problem}; tensor may be {', '.join(map(str, allowed))} ({degrees})", field="tensor")
    problem = _expert_problem(config, degrees.expert, degrees.expert_tensor)
    if problem is not None:
        splits = ((expert, degrees.stage_ranks // expert) for expert in divisors(degrees.stage_ranks))
        fitting = [expert for expert, split in splits if _expert_problem(config, expert, split) is None]
        remedy = f"expert may be {', '.join(map(str, fitting))}" if fitting else "change data or tensor"
        raise ConfigError(f"{problem}; {remedy} ({degrees})", field="expert")
    _check_redundancy(config, degrees)
    problem = _block_problem(config, degrees)
    if problem is not None:
        raise ConfigError(f"{problem}; change tensor or expert, or leave --float8 kept out ({degrees})", field="float8")


def _check_redundancy(config: ModelConfig, degrees: Degrees) -> None:
    """A group of ranks has no use for a second copy of an expert."""
    given = f"redundant-experts={degrees.redundant_experts}"
    keys = config.family.experts
    if degrees.redundant_experts and keys is None:
        raise ConfigError(f"{given}: {config.architecture} has no experts; leave it out", field="redundant_experts")
    if degrees.redundant_experts and degrees.expert == 1:
        raise ConfigError(
            f"{given}: with expert=1 all ranks have all experts; leave it out, or raise expert ({degrees})",
            field="redundant_experts",
        )
    for routing in {layer.routing for layer in config.layers if layer.routing is not None}:
        most = routing.experts * (degrees.expert - 1)
        if keys is not None and degrees.redundant_experts > most:
            slots = f"({routing.experts} + {degrees.redundant_experts}) / {degrees.expert} slots"
            raise ConfigError(
                f"{given} gives each of expert={degrees.expert} groups of ranks {slots}, more than "
                f"{keys.experts}={routing.experts}; it may be at most {most} ({degrees})",
                field="redundant_experts",
            )


def _tensor_problem(config: ModelConfig, tensor: int, exchanges_rows: bool) -> str | None:
    for name, units in _split_units(config, exchanges_rows):
        if units % tensor != 0:
            return f"tensor={tensor} does not divide {name}={units}"
    if not can_split(config.num_key_value_heads, tensor):
        heads = config.num_key_value_heads
        return f"tensor={tensor} neither divides num_key_value_heads={heads} nor is a multiple of it"
    return None


def _split_units(config: ModelConfig, exchanges_rows: bool) -> Iterator[tuple[str, int]]:
    """What tensor ranks share equally, by its key in config.json; shared experts only where no row travels."""
    yield "num_attention_heads", config.num_attention_heads
    if any(layer.routing is None for layer in config.layers):
        yield "intermediate_size", config.intermediate_size
    if exchanges_rows:
        return
    for shared in {layer.routing.shared_neurons for layer in config.layers if layer.routing is not None} - {0}:
        yield "n_shared_experts * moe_intermediate_size", shared


def _block_problem(config: ModelConfig, degrees: Degrees) -> str | None:
    """Why a matrix that stays 8 bit floats cannot be cut so: no part of it begins or ends within a block."""
    for parameter in _kept(config):
        assert parameter.block is not None
        size = splitting_ranks(degrees, expert=parameter.expert is not None, shared=parameter.shared)
        regions = [r for rank in range(size) for r in held_regions(parameter.shape, parameter.placement, rank, size)]
        for dim, length in enumerate(parameter.block):
            split = isinstance(parameter.placement, Split) and parameter.placement.dim == dim
            ends = {part for region in regions for part in (region[dim].start, region[dim].stop) if split}
            cut = min((end for end in ends if end % length), default=None)
            # What is stacked must end with a block; behind the last column nothing follows.
            if cut is not None and (dim == 0 or cut < parameter.shape[dim]):
                kind = "rows" if dim == 0 else "columns"
                return f"{size} ranks cut {parameter.name} at {cut} of its {kind}, within a block of {length}"
    return None


@functools.lru_cache(maxsize=1)
def _kept(config: ModelConfig) -> tuple[Parameter, ...]:
    """One of each kind of matrix that stays 8 bit floats."""
    if config.quantization is None or config.quantization.held is None:
        return ()
    kinds = {
        (parameter.shape, parameter.placement, parameter.expert is None, parameter.shared): parameter
        for parameter in parameter_table(config)
        if parameter.block is not None
    }
    return tuple(kinds.values())


def _expert_problem(config: ModelConfig, expert: int, expert_tensor: int) -> str | None:
    keys = config.family.experts
    if keys is None:
        return f"expert={expert}: {config.architecture} has no experts" if expert > 1 else None
    for routing in {layer.routing for layer in config.layers if layer.routing is not None}:
        if routing.experts % expert != 0:
            return f"expert={expert} does not divide {keys.experts}={routing.experts}"
        if routing.neurons % expert_tensor != 0:
            return (
                f"expert={expert} lets {expert_tensor} ranks split each expert, which does not divide "
                f"{keys.neurons}={routing.neurons}"
            )
    return None
