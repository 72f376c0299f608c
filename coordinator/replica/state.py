"""Where a replica stands on the way from one epoch to the next.

What its core decides by, and all that its shell and the cluster's status know of that. A value in the coordinator.
"""

from __future__ import annotations

import enum


class State(enum.Enum):
    """fencing: processes are being killed. waiting: for the next attempt. launching: until all ranks have attached.

    retiring: ranks end their epoch by themselves, and the next one is not on disk yet.
    """

    STARTING = "starting"
    ADOPTING = "adopting"
    RETIRING = "retiring"
    FENCING = "fencing"
    WAITING = "waiting"
    LAUNCHING = "launching"
    FORMING = "forming"
    READY = "ready"
    FAILED = "failed"
