"""What the coordinator's core is told when it begins.

A frozen value; the coordinator's own configuration is `echelon/config.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_KEPT_BYTES = 256 * 2**20
CANARY_IDLE_S = 30.0


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """This coordinator's term; how long a lost or answered request is remembered; prompt tokens that may wait.

    replicas: how many there are to choose from. max_kept_bytes: what ended and parked requests may take, about; where
    they would take more, the oldest are forgotten before their time. canary_idle_s: after so long without a token
    an idle replica is asked for one; None: never.
    """

    term: int
    resume_window_s: float
    max_queue_tokens: int
    replicas: int = 1
    max_kept_bytes: int = MAX_KEPT_BYTES
    canary_idle_s: float | None = None
