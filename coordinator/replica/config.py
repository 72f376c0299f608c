"""ReplicaConfig: what a replica's core is made with.

A frozen value between the coordinator's process, which fills it in, and `coordinator/replica/core.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from coordinator.placement import ReplicaPlan
from coordinator.replica.health import HealthLimits
from coordinator.replica.recovery import Budget

START_ATTEMPTS = 3  # then the last error is told and the start fails; a first one at once if a rank tells an error
SETTLED_S = 10.0  # a replica that served this long has left its earlier failures behind


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    """epoch is the persisted one, 0 before the first. incarnation_prefix differs between clusters on one Ray.

    layout: a digest of all that ranks are told of the plan; who serves another is not adopted. served: it has before,
    so that no failure ends the cluster.
    """

    replica: int
    term: int
    epoch: int
    plan: ReplicaPlan
    layout: str = ""
    incarnation_prefix: str = ""
    served: bool = False
    limits: HealthLimits = field(default_factory=HealthLimits)
    budget: Budget = field(default_factory=Budget)
    adopt_window_s: float = 10.0
    launch_timeout_s: float = 120.0
