"""How long each part of a cluster's start took, as its events tell it.

In the coordinator, which tells the supervisor, which shows it when the cluster serves. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from echelon.types import ClusterEvent

# Of what a rank tells when it has formed its epoch: the others are the rest.
PARTS: Mapping[str, tuple[str, ...]] = {
    "groups": ("config_s", "groups_s"),
    "weights": ("model_s", "weights_s"),
    "kernels": ("largest_step_s",),
    "graphs": ("graphs_s",),
}
MILESTONES = ("coordinator.started", "rank.attached", "replica.ready")


def startup_phases(events: Iterable[ClusterEvent], now_s: float) -> dict[str, float]:
    """Seconds by phase, one after the other, from the coordinator's start to now, when all replicas have drawn a token.

    Of ranks that formed side by side the slowest counts. Empty where ranks were not started, but adopted, and where the
    log has lost a milestone.
    """
    last: dict[str, ClusterEvent] = {}
    formed: list[Mapping[str, float]] = []
    for event in events:
        last[event.kind] = event
        if event.kind == "rank.formed":
            parts = {name: sum(_seconds(event.detail, part) for part in PARTS[name]) for name in PARTS}
            formed.append(parts)
    if not formed or any(kind not in last for kind in MILESTONES):
        return {}
    began_s, attached_s, ready_s = (last[kind].unix_s for kind in MILESTONES)
    slowest = max(formed, key=lambda parts: sum(parts.values()))
    rest_s = max(ready_s - attached_s - sum(slowest.values()), 0.0)
    return {"processes": attached_s - began_s, **slowest, "rest": rest_s, "first token": now_s - ready_s}


def _seconds(detail: Mapping[str, object], part: str) -> float:
    took_s = detail.get(part, 0.0)
    return float(took_s) if isinstance(took_s, float | int) else 0.0
