"""The figures of a timeline that `echelon trace` prints, as a line of text and as JSON.

In the user's terminal. Pure: a timeline in, figures out. Bubbles are shares of stage-seconds between 0 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel.schedule import Kind
from parallel.timeline import Timeline


@dataclass(frozen=True, slots=True)
class StageFigures:
    """What one stage did: operations, and the share of the whole span in which it did none."""

    stage: int
    forwards: int
    backs: int
    busy_s: float
    idle: float


@dataclass(frozen=True, slots=True)
class Figures:
    """ideal_bubble: of the closed form, where it holds. round_s, steady_bubble: at inference, where there are any."""

    title: str
    span_s: float
    bubble: float
    ideal_bubble: float | None
    round_s: float | None
    steady_bubble: float | None
    stages: tuple[StageFigures, ...]


def figures(
    title: str, timeline: Timeline, *, ideal: float | None = None, cohorts: int = 0, inference: bool = True
) -> Figures:
    """The figures of a timeline; cohorts that take turns, if that is known."""
    since_s, until_s = timeline.filled()
    forwards = sum(record.op.kind is Kind.FORWARD for record in timeline.of_stage(0))
    return Figures(
        title,
        timeline.span_s,
        timeline.bubble(),
        ideal,
        timeline.round_s(cohorts) if 0 < cohorts < forwards else None,
        timeline.bubble(since_s, until_s) if inference and until_s > since_s else None,
        tuple(_stage(timeline, stage) for stage in range(timeline.stages)),
    )


def summary(found: Figures) -> str:
    """All but the stages, on one line."""
    parts = [f"{found.span_s:.6g} s, bubble {found.bubble:.1%}"]
    if found.ideal_bubble is not None:
        parts.append(f"closed form {found.ideal_bubble:.1%}")
    if found.round_s is not None:
        parts.append(f"round {found.round_s:.6g} s")
    if found.steady_bubble is not None:
        parts.append(f"bubble {found.steady_bubble:.1%} between filling and draining")
    return "; ".join(parts)


def _stage(timeline: Timeline, stage: int) -> StageFigures:
    ops, busy_s = timeline.ops(stage), timeline.busy_s(stage)
    forwards = sum(op.kind is Kind.FORWARD for op in ops)
    idle = 1 - busy_s / timeline.span_s if timeline.span_s else 0.0
    return StageFigures(stage, forwards, len(ops) - forwards, busy_s, idle)
