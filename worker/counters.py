"""Counters of the scheduler: what it has done since its epoch began, told with every report.

Lives in the leader; names, and the arithmetic of those that are not plain increments. Knows sequences and rows.
"""

from __future__ import annotations

from worker.plan import Row
from worker.sequence import Sequence

NAMES = (
    "steps",
    "prefill_chunks",
    "chunked_prompts",
    "decode_rows",  # choices that decode, in all steps
    "drafted_tokens",
    "accepted_tokens",  # of these, what was drawn indeed: so many ids beside one for each of decode_rows
    "replayed_requests",
    "preemptions",
    "recomputed_tokens",  # computed again after a preemption
    "cache_hits",  # beginnings that found something in the cache
    "cached_tokens",  # found there, instead of computed
    "shared_prefix_tokens",  # of these, computed for another choice of the same request
)


def count_beginning(counters: dict[str, int], sequence: Sequence) -> None:
    """A sequence has got its slot and what the cache had for it."""
    request, of_prompt = sequence.request, min(sequence.cached, sequence.prompt_tokens)
    counters["cache_hits"] += sequence.cached > 0
    counters["cached_tokens"] += sequence.cached
    if request.cached_tokens is None:
        request.cached_tokens = of_prompt
    elif not sequence.computed:
        counters["shared_prefix_tokens"] += of_prompt


def count_chunk(counters: dict[str, int], sequence: Sequence, row: Row) -> None:
    """A chunk of what is given has been planned."""
    counters["prefill_chunks"] += 1
    counters["chunked_prompts"] += row.first == sequence.cached and not row.sampled
    counters["recomputed_tokens"] += max(0, min(row.first + row.tokens, sequence.computed) - row.first)
