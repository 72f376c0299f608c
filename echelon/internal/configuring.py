"""How a running `echelon serve` is told another configuration, and how it answers: its --config file and its stderr.

For `echelon.testing`, in a test's process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

CHANGED, NOT_CHANGED = "echelon: reconfigured", "echelon: not reconfigured: "


def write_config(path: Path, flags: Mapping[str, object]) -> None:
    """The file with these flags, by their names in Python. JSON is YAML; what is None is left out."""
    values = {name.replace("_", "-"): value for name, value in flags.items() if value is not None}
    path.write_text(json.dumps(values, default=str))


def told_change(log_path: Path, heard_bytes: int) -> str | None:
    """What the supervisor said of a change behind so much of its log: None nothing yet, empty done, else why not."""
    with log_path.open("rb") as log:
        log.seek(heard_bytes)
        lines = log.read().decode(errors="replace").splitlines()
    for line in lines:
        if line == CHANGED:
            return ""
        if line.startswith(NOT_CHANGED):
            return line.removeprefix(NOT_CHANGED)
    return None
