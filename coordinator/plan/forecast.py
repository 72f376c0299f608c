"""The forecast of a layout: the time of a decode round, the rate of prefill, the bubble, and what both make of a load.

Pure, for the planner. Slots come from the roofline, rounds from the simulator of the schedule that engines follow. A
load is written N x I x O: N requests at once, I prompt tokens and O tokens of an answer each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.plan.memory import Limits, Load
from coordinator.plan.roofline import Batch, Roofline, Slot
from echelon.bench.cases import Case
from parallel.schedule import Kind, Op, decode_rounds
from parallel.timeline import simulate

ROUNDS = 4  # simulated: from the second on they are alike


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """running: requests that the KV cache holds at once, of the case's. Times are lower bounds.

    round_s: a token for every running request, of cohorts that take turns on the stages; bubble: of those rounds.
    slots: a cohort's, by stage; way_s: from stage to stage. first_token_s: of a prompt alone on the cluster. prefill:
    prompt tokens a second over all replicas. total_s: of the whole case, prompts first, then decoding, in waves if not
    all requests run at once; output_tokens_s: of that.
    """

    case: Case
    running: int
    cohorts: int
    cohort_rows: int
    slots: tuple[Slot, ...]
    way_s: float
    round_s: float
    bubble: float
    prefill_tokens_s: float
    prefill_slots: tuple[Slot, ...]
    first_token_s: float
    total_s: float
    output_tokens_s: float


def forecast(rates: Roofline, held: Load, limits: Limits, case: Case, *, simulated: bool = True) -> Forecast:
    """What the layout does with the case. simulated: False takes the round in closed form, which is the same."""
    running = min(case.requests, held.requests(case.tokens))
    assert running > 0, f"no request of {case} fits {held.degrees}"
    rows = -(-running // held.pools)
    cohorts = min(held.degrees.pipeline, rows)
    batch = decode_batch(-(-rows // cohorts), case.prompt_tokens + case.output_tokens / 2)
    slots, way_s = _slots(rates, held, batch), rates.way_s(batch)
    seconds = [slot.total for slot in slots]
    round_s, bubble = simulated_round(seconds, cohorts, way_s) if simulated else closed_round(seconds, cohorts, way_s)

    waiting = -(-case.requests // held.pools) * case.prompt_tokens
    chunk = prefill_batch(min(limits.step_tokens, waiting), case.prompt_tokens)
    prefill_slots = _slots(rates, held, chunk)
    slowest_s = max(slot.total for slot in prefill_slots)
    prefill_tokens_s = chunk.tokens * held.pools / slowest_s
    first_token_s = _first_token_s(rates, held, limits, case)
    prefill_s = max(case.requests * case.prompt_tokens / prefill_tokens_s, first_token_s)
    waves = -(-case.requests // running)
    total_s = prefill_s + waves * case.output_tokens * round_s
    return Forecast(
        case=case,
        running=running,
        cohorts=cohorts,
        cohort_rows=batch.rows,
        slots=slots,
        way_s=way_s,
        round_s=round_s,
        bubble=bubble,
        prefill_tokens_s=prefill_tokens_s,
        prefill_slots=prefill_slots,
        first_token_s=first_token_s,
        total_s=total_s,
        output_tokens_s=case.requests * case.output_tokens / total_s,
    )


def decode_batch(rows: int, context_tokens: float) -> Batch:
    """One token for each row."""
    return Batch(tokens=rows, sampled=rows, rows=rows, read_tokens=context_tokens, pairs=context_tokens, decode=True)


def prefill_batch(tokens: int, prompt_tokens: int) -> Batch:
    """A step full of prompts of that length, or of a part of one: half of a prompt is before a token on average."""
    rows = max(1, tokens // prompt_tokens)
    pairs = tokens / rows * (prompt_tokens + 1) / 2
    return Batch(tokens=tokens, sampled=rows, rows=rows, read_tokens=(prompt_tokens + 1) / 2, pairs=pairs, decode=False)


def simulated_round(slots_s: Sequence[float], cohorts: int, way_s: float) -> tuple[float, float]:
    """Seconds of a round of equal cohorts through stages of these slots, and the share of them that stages idle."""
    stages = len(slots_s)

    def cost_s(stage: int, op: Op) -> float:
        return slots_s[stage] if op.kind is Kind.FORWARD else 0.0

    timeline = simulate(decode_rounds(stages, cohorts, ROUNDS, depth=stages), cost_s, latency_s=way_s)
    # On the last stage, which has the pace of the slowest at once; the first runs ahead until it has its fill.
    starts_s = [record.start_s for record in timeline.of_stage(stages - 1) if record.op.kind is Kind.FORWARD]
    round_s = starts_s[-1] - starts_s[-1 - cohorts]
    return round_s, _idle(slots_s, cohorts, round_s)


def closed_round(slots_s: Sequence[float], cohorts: int, way_s: float) -> tuple[float, float]:
    """The same without a simulation: the slowest stage serves all cohorts, and a cohort passes all stages."""
    ways = len(slots_s) * way_s if len(slots_s) > 1 else 0.0
    round_s = max(cohorts * max(slots_s), sum(slots_s) + ways)
    return round_s, _idle(slots_s, cohorts, round_s)


def _idle(slots_s: Sequence[float], cohorts: int, round_s: float) -> float:
    return max(0.0, 1 - cohorts * sum(slots_s) / (len(slots_s) * round_s))


def _slots(rates: Roofline, held: Load, batch: Batch) -> tuple[Slot, ...]:
    return tuple(rates.slot(stage, batch) for stage in held.stages)


def _first_token_s(rates: Roofline, held: Load, limits: Limits, case: Case) -> float:
    """A prompt alone: its chunks follow each other through the stages."""
    chunks = math.ceil(case.prompt_tokens / limits.step_tokens)
    batch = prefill_batch(-(-case.prompt_tokens // chunks), case.prompt_tokens)
    seconds = [slot.total for slot in _slots(rates, held, batch)]
    return sum(seconds) + (chunks - 1) * max(seconds) + (held.degrees.pipeline - 1) * rates.way_s(batch)
