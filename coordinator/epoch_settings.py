"""What every rank is told of an epoch besides its store and its blocks, from the configuration.

In the coordinator, and in `echelon bench`, which starts ranks without one. Pure.
"""

from __future__ import annotations

import hashlib

from coordinator.placement import ReplicaPlan
from echelon.config import CoordinatorConfig
from echelon.internal.v1 import control_pb2


def epoch_settings(config: CoordinatorConfig, plan: ReplicaPlan) -> control_pb2.FormEpoch:
    """layout is a digest of all of it."""
    settings = control_pb2.FormEpoch(
        model_path=str(config.model),
        dtype=config.dtype,
        keep_float8=config.keeps_float8,
        pipeline=config.pipeline,
        data=config.data,
        tensor=config.tensor,
        expert=config.expert,
        pipeline_depth=config.pipeline_depth or config.pipeline,
        rebalance_steps=config.rebalance_steps,
        redundant_experts=config.redundant_experts,
        predicts=config.speculation == "mtp",
        speculation_tokens=0 if config.speculation == "off" else config.speculation_tokens,
        trace_dir=str(config.trace_dir or ""),
        block_tokens=plan.block_tokens,
        max_running=config.max_running,
        cuda_graphs=config.cuda_graphs == "auto",
        max_step_tokens=config.max_step_tokens,
        max_context=config.max_context,
        kv_blocks_limit=plan.kv_blocks_limit or 0,
        checkpoint_dir=str(config.checkpoint_dir or ""),
        model_digest=config.model_digest,
        random_weights=config.load_format == "random",
    )
    settings.layout = hashlib.sha256(settings.SerializeToString(deterministic=True)).hexdigest()
    return settings
