"""EngineLimits: what one replica may hold and compute, and which requests can never run within that.

Lives in the leader. Knows no state of a scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass

from echelon.internal.link import Assign


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What one replica holds at once (slots, blocks), computes at once (tokens), and leaves unacknowledged at most.

    stages: of its pipeline; depth: how many steps pass through it at once. data: its data ranks, each of which has
    slots, blocks and tokens of its own. rebalance_steps: experts move every so many steps, never if 0.
    speculation_tokens: the most drafts of a row, none if 0. predicts: they come with results, from the model. captures:
    numbers of rows of the CUDA graphs that ranks capture while they serve.
    """

    max_running: int
    kv_blocks: int
    block_tokens: int
    max_step_tokens: int
    max_context: int
    max_unacked_reports: int = 1024
    stages: int = 1
    depth: int = 1
    data: int = 1
    rebalance_steps: int = 0
    speculation_tokens: int = 0
    predicts: bool = False
    captures: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if name == "captures":
                continue
            least = 0 if name in ("rebalance_steps", "speculation_tokens", "predicts") else 1
            assert getattr(self, name) >= least, f"{name} must be at least {least}, got {getattr(self, name)}"


def decode_places(max_running: int, speculation_tokens: int) -> int:
    """The most decode rows of a step: those of a full batch, or of one choice with all its drafts.

    Drafts take places that nobody has, so a full batch has none and no step needs more memory for them.
    """
    return max(max_running, 1 + speculation_tokens)


def refusal(assign: Assign, limits: EngineLimits) -> str:
    """Why a request can never run within these limits, even alone; empty if it can."""
    prompt, new = len(assign.prompt), assign.sampling.max_tokens
    choices = [progress.choice for progress in assign.choices]
    if not choices or len(set(choices)) < len(choices):
        return f"choices {choices}: there must be one at least, and each once"
    if not prompt or new < 1:
        return f"prompt of {prompt} tokens and max_tokens {new}: both must be at least 1"
    if prompt + new > limits.max_context:
        return f"prompt {prompt} + max_tokens {new} = {prompt + new} tokens exceed max_context {limits.max_context}"
    if (blocks := -(-(prompt + new) // limits.block_tokens)) > limits.kv_blocks:
        return f"{prompt + new} tokens need {blocks} blocks of {limits.block_tokens}; the cache has {limits.kv_blocks}"
    return ""
