"""When a failed call is tried again: one pure decision, the same for every call of the SDK.

Knows no call, no clock and no randomness.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from echelon.errors import DeadlineError, EchelonError


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Back-off between tries after a retryable error: initial_s, doubled up to max_s, each less up to half by jitter.

    max_retries: None tries until the deadline, 0 never tries again.
    """

    initial_s: float = 0.1
    max_s: float = 1.0
    max_retries: int | None = None

    def delay_s(self, retries: int, key: str) -> float:
        """The wait before the next try; key spreads callers, so that they do not come back all at once."""
        jitter = zlib.crc32(f"{key}/{retries}".encode()) / 2**32
        return min(self.initial_s * 2.0 ** min(retries, 32), self.max_s) * (1 - jitter / 2)


def decide_retry(
    now: float, error: EchelonError, retries: int, deadline: float | None, policy: RetryPolicy, key: str
) -> float | EchelonError:
    """Seconds to wait before the next try, or the error to give up with: final, tried enough, or no time left."""
    if not error.retryable or (policy.max_retries is not None and retries >= policy.max_retries):
        return error
    delay_s = max(policy.delay_s(retries, key), error.retry_after_s or 0.0)
    if deadline is None:
        return delay_s
    if now >= deadline:
        late = DeadlineError(f"the deadline passed: {error.message}", request_id=error.request_id)
        late.__cause__ = error
        return late
    return min(delay_s, deadline - now)
