"""The floor of a case: seconds that no engine can be under, of bytes and products alone, for a device's rates.

Pure, for `echelon bench`. Decode: the bytes of the weights that a step touches and of the keys and values that it
reads, over the bandwidth, and the latency of its all-reduces; prefill: 2 x active parameters x tokens over the FLOP
rate. The planner's roofline has more: the pairs of attention, exchanges, and stages as layers can be cut.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.plan.census import Census
from echelon.bench.cases import Case
from models.parameter import FLOAT8_BYTES
from parallel.degrees import Degrees


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Of one device, measured: bytes a second that it reads, FLOP a second, and seconds of a small all-reduce."""

    read_bytes_s: float
    flops: float
    all_reduce_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """least_s: products and reads overlap perfectly; most_s: no prompt is computed while others decode.

    flop and read_bytes: of the whole case, of all devices together. step_bytes: of weights in a step of decoding, on
    the rank that reads most; kv_token_bytes: of all ranks together.
    distinct_experts: of a layer in a step, None where there are none.
    """

    least_s: float
    most_s: float
    prefill_s: float
    decode_s: float
    flop: float
    read_bytes: float
    step_bytes: float
    kv_token_bytes: int
    distinct_experts: float | None


def floor(census: Census, degrees: Degrees, case: Case, rates: Rates, distinct_experts: float | None = None) -> Floor:
    """Requests and layers are dealt evenly, and requests decode at half of their answers on average.

    distinct_experts: as counted; else as many as are expected of rows that choose at random.
    """
    config = census.config
    cohorts, cohort_rows = decode_rows(degrees, case)
    if distinct_experts is None:
        distinct_experts = expected_experts(census, cohort_rows * degrees.data)
    touched = 0.0 if census.routing is None or distinct_experts is None else distinct_experts / census.routing.experts
    context_tokens = case.prompt_tokens + case.output_tokens / 2
    slots_s, slots_bytes, step_bytes, kv_token_bytes = [], [], 0.0, 0
    for stage, layers in enumerate(census.cut(degrees.pipeline)):
        numbers = census.held(degrees, layers, stage)
        weights = (numbers.every_token + numbers.head + touched * numbers.expert) * census.weight_bytes
        saved_bytes = census.weight_bytes - FLOAT8_BYTES
        weights -= (numbers.float8 + touched * numbers.float8_experts) * saved_bytes  # what stays an 8 bit float
        kv_bytes = census.kv_bytes_per_token(degrees, layers)
        slots_bytes.append(weights + cohort_rows * context_tokens * kv_bytes)
        reduces = 2 * len(census.computed(layers)) if degrees.tensor > 1 else 0
        slots_s.append(slots_bytes[-1] / rates.read_bytes_s + reduces * rates.all_reduce_s)
        step_bytes, kv_token_bytes = max(step_bytes, weights), kv_token_bytes + kv_bytes * degrees.tensor
    decode_s = case.output_tokens * sum(slots_s)  # each cohort is in one of as many equal stages
    head = config.vocab_size * config.hidden_size
    body, every = census.parameters_per_token - head, census.parameters_per_token
    prefill_flop = 2 * body * case.requests * case.prompt_tokens
    flop = prefill_flop + 2 * every * case.output_count
    prefill_s, products_s = (count / rates.flops / degrees.ranks for count in (prefill_flop, flop))
    return Floor(
        least_s=max(products_s, decode_s),
        most_s=max(products_s, prefill_s + decode_s),
        prefill_s=prefill_s,
        decode_s=decode_s,
        flop=flop,
        read_bytes=case.output_tokens * cohorts * sum(slots_bytes) * degrees.ranks / degrees.pipeline,
        step_bytes=step_bytes,
        kv_token_bytes=kv_token_bytes,
        distinct_experts=distinct_experts,
    )


def decode_rows(degrees: Degrees, case: Case) -> tuple[int, int]:
    """Cohorts that take turns on the stages, and the rows of each on one data rank."""
    rows = -(-case.requests // (degrees.replicas * degrees.data))
    cohorts = min(degrees.pipeline, rows)
    return cohorts, -(-rows // cohorts)


def expected_experts(census: Census, rows: int) -> float | None:
    """Of a layer, that some of so many rows choose, if each chooses at random; None for a model without experts."""
    routing = census.routing
    if routing is None:
        return None
    return routing.experts * (1 - (1 - routing.experts_per_token / routing.experts) ** rows)
