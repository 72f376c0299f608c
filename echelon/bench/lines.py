"""Rows of `echelon bench` as they lie in a file: a JSON object a line.

In the user's terminal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from echelon.errors import ConfigError


def read_lines(path: Path, flag: str) -> list[dict[str, Any]]:
    """Empty ones left out. Raises ConfigError naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {path} cannot be read: {error}", field=flag.lstrip("-").lower()) from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            values = error
        if not isinstance(values, dict):
            problem = f"{flag} {path}, line {number} is no JSON object"
            raise ConfigError(problem, field=flag.lstrip("-").lower()) from None
        found.append(values)
    return found
