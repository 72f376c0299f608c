"""What of a journal could not be read, as a value.

Found by the codec when a coordinator begins, and told by it in an event and a metric.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Damage:
    """From at_byte on nothing of the segment was used: frames are found by their lengths, one after the other."""

    segment: str
    at_byte: int
    lost_bytes: int
    reason: str
