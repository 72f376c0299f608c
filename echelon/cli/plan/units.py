"""Numbers with units as people type them: 141GB, 80GiB, 4.8TB, 989T.

In the user's terminal; knows no model. A number that could mean two things is refused, not guessed.
"""

from __future__ import annotations

import re

from echelon.errors import ConfigError

SCALES = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}

_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)(?:/s)?")


def byte_count(text: str, flag: str) -> float:
    """Bytes, or bytes a second. Raises ConfigError unless a unit is given."""
    match = _NUMBER.fullmatch(text.strip())
    unit = match[2] if match else ""
    scales = {f"{prefix}b": scale for prefix, scale in SCALES.items()} | {f"{p}b": s for p, s in BINARY.items()}
    by_case = {name.lower(): scale for name, scale in scales.items()} | {p.lower(): s for p, s in BINARY.items()}
    scale = by_case.get(unit.lower())
    if match is None or scale is None or float(match[1]) <= 0:
        hint = f"{text.strip()}GB or {text.strip()}GiB" if match and not unit else "141GB, 80GiB or 4.8TB"
        raise ConfigError(f"{flag} must be a number > 0 with a unit, as in {hint}; got {text!r}", field=_field(flag))
    return float(match[1]) * scale


def flop_rate(text: str, flag: str = "--gpu-flops") -> float:
    """FLOP a second: 989T is 989e12."""
    match = _NUMBER.fullmatch(text.strip())
    unit = match[2].removesuffix("FLOPs").removesuffix("FLOPS").removesuffix("FLOP") if match else ""
    if match is None or unit not in ("G", "T", "P") or float(match[1]) <= 0:
        raise ConfigError(
            f"{flag} must be a number > 0 of dense 16-bit FLOP a second, as in 989T; got {text!r}",
            field=_field(flag),
        )
    return float(match[1]) * SCALES[unit]


def _field(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
