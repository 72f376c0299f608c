"""What a check says: a finding with its level, and how to say it.

Used by the doctor's checks and by what prints them. Pure.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Level(enum.Enum):
    """fail: it will not work; warn: it may not, or not well."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One judgement. remedy: what to do, empty where there is nothing to do."""

    name: str
    level: Level
    message: str
    remedy: str = ""


def ok(name: str, message: str) -> Finding:
    return Finding(name, Level.OK, message)


def warn(name: str, message: str, remedy: str = "") -> Finding:
    return Finding(name, Level.WARN, message, remedy)


def fail(name: str, message: str, remedy: str) -> Finding:
    return Finding(name, Level.FAIL, message, remedy)


def size(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
